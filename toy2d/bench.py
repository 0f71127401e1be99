"""What an iteration of backtrack.py costs: python -m toy2d.bench, see runtime/bench.py."""

from typing import Any

import torch

import backtrack
from runtime import bench, command
from runtime.interface import Problem
from toy2d import mixture, model, problem


def make(config: problem.Config, seed: int, device: Any) -> Problem:
    """The toy with a teacher of random weights."""
    torch.set_num_threads(1)  # as the toy's own runs
    data = getattr(mixture, config.data)()
    teacher = model.Denoiser(config.width, config.depth, config.sigma_data, data.dims)
    return problem.assemble(config, seed, device, data, teacher, "random")


BENCH = bench.Bench("toy2d", make, backtrack)

if __name__ == "__main__":
    command.run(lambda argv: bench.main(BENCH, 500, argv),
                "lower --batch or the network's size, or raise --accumulate")
