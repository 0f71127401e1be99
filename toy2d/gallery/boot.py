"""BOOT (arXiv 2306.05544, Eq. 9 to 11): bootstrap the signal ODE.

Claim: a student g(z, sigma) of y = x(sigma) - sigma z, the signal along the teacher's trajectory
from HI z, can be trained from its own earlier answers, without data and without a Jacobian.
Asked: P, at y + sigma z, the student's guess of a state. --backtrack is a control: the target is a
map here, so that the student must unlearn every node's.
Lost in 2D: nothing; the slow way of the information, 70 hops from sigma 20 to 0.02, shows.
"""

import math

import torch
from torch import Tensor, nn

from toy2d import model
from toy2d.gallery.core import BATCH, HI, LO, Result, Toy, loop, update
from toy2d.gallery.samplers import at

NAME, QUERIES, START, STEPS, BACKTRACK = "BOOT", "P", "off", 1, True
HOP = 0.1  # of log sigma


class Signal(nn.Module):
    """g(z, sigma) -> y."""

    def __init__(self):
        super().__init__()
        self.net = model.mlp(2 + 8, 2, 128, 3)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        phase = sigma.log() / 4 * 2.0 ** torch.arange(4)
        return self.net(torch.cat([z, phase.sin(), phase.cos()], dim=1))


@torch.no_grad()
def hop(teacher: nn.Module, y: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """y a hop further down: the DDIM step of y + sigma z, without its noise."""
    return y + (1 - math.exp(-HOP)) * (teacher(y + sigma * z, sigma) - y)


def loss(g: nn.Module, teacher: nn.Module, z: Tensor, sigma: Tensor) -> Tensor:
    """The hop's error, and at HI the boundary's: the teacher's first answer. The published weight
    of the hop is constant, as HOP is."""
    with torch.no_grad():
        below, top = hop(teacher, g(z, sigma), z, sigma), teacher(HI * z, at(z, HI))
    lower = sigma * math.exp(-HOP)
    return (g(z, lower) - below).square().mean() + (g(z, at(z, HI)) - top).square().mean()


def train(toy: Toy, steps: int = 3000) -> Result:
    g = Signal()
    target, _, walk = toy.nets(lambda n: (g(z := torch.randn(n, 2), at(z, LO)), None), interval=30)
    adam = toy.adam(g, 1e-3, 0.9, 0.99)
    lowest = math.log(LO) + HOP
    for _ in loop(toy.steps(steps, 9), adam):
        sigma = (lowest + (math.log(HI) - lowest) * torch.rand(BATCH, 1)).exp()
        update(adam, loss(g, target, torch.randn(BATCH, 2), sigma))
        walk.step()
    return Result(lambda z, _: g(z, at(z, LO)))
