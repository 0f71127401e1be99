"""What an iteration of backtrack.py costs, and where its time goes: python -m imagenet64.bench

Preset tiny is the digits' network, preset full the ADM, both of random weights. See
runtime/bench.py.
"""

from typing import Any

import torch

import backtrack
from imagenet64 import edm, problem
from runtime import bench, command, ranks
from runtime.interface import Problem


def random_teacher(config: problem.Config) -> edm.Denoiser:
    """The preset's network, made where it is to be. A GPU multiplies zeros faster, so that weights
    which start at zero are made random too."""
    with ranks.device():
        net = edm.Denoiser(**problem.NETWORKS[config.images])
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return net


def make(config: problem.Config, seed: int, device: Any) -> Problem:
    """Without an evaluation, for which the benchmark has no use: it would train a classifier."""
    if config.images == "digits":
        torch.set_num_threads(1)  # as the preset's own runs
    return problem.assemble(config, seed, device, random_teacher(config), "random", None)


BENCH = bench.Bench("imagenet64", make, backtrack)

if __name__ == "__main__":
    command.run(lambda argv: bench.main(BENCH, 5, argv),
                "lower --batch or the network's size, or raise --accumulate")
