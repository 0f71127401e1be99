"""What an iteration of backtrack.py costs, and where its time goes: python -m imagenet64.bench

Preset tiny is the digits' network, preset full the ADM, both of random weights. See toy2d/bench.py.
"""

import functools
from unittest import mock

import torch

import disback
from imagenet64 import edm, problem
from toy2d import bench


def random_teacher(config: problem.Config) -> tuple[edm.Denoiser, str]:
    """The preset's network, made where it is to be. A GPU multiplies zeros faster, so that weights
    which start at zero are made random too."""
    with disback.device():
        net = edm.Denoiser(**problem.NETWORKS[config.images])
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return net, "random"


# Its evaluation, which the benchmark has no use for, would train the digits' classifier.
RANDOM = [mock.patch.multiple(problem, load_teacher=random_teacher,
                              Evaluation=lambda config, device: None)]

if __name__ == "__main__":
    disback.run(functools.partial(bench.main, "imagenet64", RANDOM, 5))
