"""What happens to student and fake while a run lasts: four numbers, and what pictures need."""

import copy

import torch
from torch import Tensor, nn

import disback
from toy2d.mixture import Mixture

# Noise levels sigma: the median of the lognormal ones, and a standard deviation to either side.
LEVELS = 0.26, 0.86, 2.8
GRID = 13  # arrows on a side of trajectory.html
EARLY = 150  # iterations that are looked at step by step


class Diagnosis:
    """diagnosis(student, fake) -> numbers for a line of the log, of 1,000 samples of the student
    itself, not of its average, from fixed random numbers:

    data_distance: from the mean of the samples to that of the data. spread: the samples' standard
    deviation, over the plane's two coordinates together. fake_bias: see `bias`. teacher_error: the
    distance (disback.distance) of the teacher from the data's exact denoiser."""

    def __init__(self, data: Mixture, teacher: nn.Module, student: nn.Module, n: int = 1000):
        self.data, self.teacher = data, copy.deepcopy(teacher)  # the target's weights will change
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.z, self.eps = torch.randn(n, data.dims), torch.randn(n, data.dims)
            points = data.sample(n)
        self.mean = data.weights @ data.means
        with torch.no_grad():
            start = answers(student, self.z)
        self.limits = frame(torch.cat([points, start])[:, :2])

    @torch.no_grad()
    def __call__(self, student: nn.Module, fake: nn.Module) -> dict[str, float]:
        x0 = answers(student, self.z)
        error = torch.zeros(())
        for level in LEVELS:
            sigma = torch.full((len(x0), 1), level)
            x = x0 + sigma * self.eps
            error += disback.distance(answers(self.teacher, x, sigma),
                                      self.data.denoise(x, sigma), sigma) / len(LEVELS)
        return {"data_distance": (x0.mean(dim=0) - self.mean).norm().item(),
                "spread": x0[:, :2].var(dim=0).mean().sqrt().item(),
                "fake_bias": bias(fake, x0, self.eps), "teacher_error": error.item()}

    @torch.no_grad()
    def look(self, student: nn.Module, fake: nn.Module, target: nn.Module) -> dict[str, Tensor]:
        """The student's samples [n, 2]; and what the fake and the target take the points of a grid
        on the plane for, [levels, GRID * GRID, 2]."""
        x0 = answers(student, self.z)
        x = self.grid().new_zeros(GRID * GRID, self.data.dims) + x0.mean(dim=0)
        x[:, :2] = self.grid()
        seen = [[answers(net, x, x.new_full((len(x), 1), level))[:, :2] for level in LEVELS]
                for net in (fake, target)]
        return {"student": x0[:, :2].contiguous(), "fake": torch.stack(seen[0]),
                "target": torch.stack(seen[1])}

    def grid(self) -> Tensor:
        """Points [GRID * GRID, 2] from the data to the student's first samples."""
        low, high = self.limits
        axis = low + (high - low) * (torch.arange(GRID) + 0.5) / GRID
        return torch.cartesian_prod(axis, axis)


def bias(fake: nn.Module, x0: Tensor, eps: Tensor) -> float:
    """The length of E[D(x0 + sigma eps) - x0], over sigma + 0.5 as in disback.distance, the mean
    over LEVELS. It is 0 for the exact denoiser of samples x0 [n, d]; a fake that lags behind them
    takes them for what they were. Of few samples chance makes it larger, about 0.01 of 1,000."""
    found = torch.zeros(())
    for level in LEVELS:
        sigma = torch.full((len(x0), 1), level)
        error = (answers(fake, x0 + sigma * eps, sigma) - x0).mean(dim=0)
        found += error.norm() / (level + 0.5) / len(LEVELS)
    return found.item()


def answers(net: nn.Module, *inputs: Tensor) -> Tensor:
    """Of a network, wherever it is, to inputs on the CPU, where all figures' are."""
    device = next(net.parameters()).device
    return net(*(tensor.to(device) for tensor in inputs)).cpu()


def frame(x: Tensor) -> tuple[float, float]:
    """Limits of both axes that hold all points."""
    low, high = x.min().item(), x.max().item()
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
