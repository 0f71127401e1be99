"""Hyper-SD (arXiv 2404.13686, Sections 3.1 and 3.3): consistency within segments, then DMD.

Claim: a student that is consistent within 8, then 4, 2 and 1 segments of the trajectory learns each
in turn more easily. Asked: X, noised data; S in the last stage, DMD, where --backtrack walks.
Lost in 2D: the adversarial distance, whose weights are unpublished, and human feedback. Differs
from the paper: it draws the end of a jump between the segment's end and sigma_(n+1); without the
end as an input one net cannot serve all ends, so it is the segment's end here.
"""

import torch
from torch import Tensor, nn

from toy2d.gallery.core import BATCH, Result, Toy, dsm, loop, update, vsd
from toy2d.gallery.samplers import jump, levels, one

NAME, QUERIES, START, STEPS, BACKTRACK = "Hyper-SD", "X, then S", "copy", 1, True
VARIANTS = {"one segment throughout": {"segments": (1,)}}
GRID = torch.tensor(levels(40))  # sigma_0 > ... > sigma_40 = 0


def segment_end(n: Tensor, segments: int) -> Tensor:
    """The index at which the segment of index n ends."""
    length = 40 // segments
    return (n // length + 1) * length


def heun(net: nn.Module, x: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
    """One step of the probability-flow ODE for sigma and lower [n, 1]; Euler's down to 0."""
    slope = (x - net(x, sigma)) / sigma
    euler, safe = x + (lower - sigma) * slope, torch.where(lower > 0, lower, sigma)
    second = (euler - net(euler, safe)) / safe
    return torch.where(lower > 0, x + (lower - sigma) * (slope + second) / 2, euler)


def consistency(net: nn.Module, teacher: nn.Module, x0: Tensor, segments: int) -> Tensor:
    """Two neighbours on a trajectory must jump to the same point at the end of their segment."""
    n = torch.randint(40, (len(x0), 1))
    end = segment_end(n, segments)
    sigma, lower, e = GRID[n], GRID[n + 1], GRID[end]
    x = x0 + sigma * torch.randn_like(x0)
    with torch.no_grad():
        below = heun(teacher, x, sigma, lower)
        safe = torch.where(lower > 0, lower, sigma)
        right = torch.where(n + 1 == end, below, jump(below, net(below, safe), safe, e))
    weight = (1 + 1 / sigma**2) / (1 - e / sigma) ** 2
    return (weight * (jump(x, net(x, sigma), sigma, e) - right) ** 2).mean()


def train(toy: Toy, segments: tuple[int, ...] = (8, 4, 2, 1), steps: int = 1600) -> Result:
    net = toy.copy()
    adam = toy.adam(net, 1e-3, 0.9, 0.99)
    for i in loop(steps, adam):
        update(adam, consistency(net, toy.teacher, toy.data.sample(BATCH),
                                 segments[i * len(segments) // steps]))
    before = toy.measure(lambda z, _: one(net)(z))["swd"]
    target, fake, walk = toy.nets(lambda n: (one(net)(torch.randn(n, 2)), None))
    adam, adam_fake = toy.adam(net, 1e-3), toy.adam(fake, 2e-3)
    for _ in loop(toy.steps(300, 8), adam, adam_fake):
        x0 = one(net)(torch.randn(BATCH, 2))
        loss, mismatch = vsd(x0, toy.sigma(), fake, target, "dmd")
        update(adam, loss)
        update(adam_fake, dsm(fake, x0.detach(), toy.sigma()))
        walk.step(mismatch)
    return Result(lambda z, _: one(net)(z), numbers={"before DMD": before})
