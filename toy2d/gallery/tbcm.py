"""TBCM (arXiv 2511.20410): sCM on the teacher's own trajectories.

Claim: consistency distillation needs no data; the points come from the teacher's sampler, whose
answers on the way are the tangents. Source: hustvl/TBCM train_tbcm.py, tbcm_utils.py. Asked: J.
The levels are drawn afresh every time: with fixed ones f is trained at a few values of sigma only.
Lost in 2D: the cost that it saves, encoding images; here data are free, and have the exact noised
law, which coarse DDIM trajectories have not. Left out: a filter against black images.
"""

import torch
from torch import Tensor, nn

from toy2d.gallery.core import BATCH, HI, Result, Toy, loop, update
from toy2d.gallery.samplers import at, jump, lognormal, one, two
from toy2d.gallery.sprint import scm

NAME, QUERIES, START, STEPS, BACKTRACK = "TBCM", "J", "copy", 1, False
LEVELS = 16


@torch.no_grad()
def trajectories(teacher: nn.Module, sigmas: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n trajectories from HI down through `sigmas`, by DDIM steps: all points x, their sigma, and
    what the teacher answered there. The first point, at HI, is dropped."""
    x = HI * torch.randn(n, 2)
    sigma = at(x, HI)
    d, points = teacher(x, sigma), []
    for lower in sigmas:
        x, sigma = jump(x, d, sigma, lower), at(x, lower)
        d = teacher(x, sigma)
        points.append((x, sigma, d))
    return tuple(torch.cat(part) for part in zip(*points))


def train(toy: Toy, steps: int = 2000) -> Result:
    net = toy.copy()
    adam = toy.adam(net, 1e-3, 0.9, 0.99)
    for i in loop(steps, adam):
        sigmas = lognormal(LEVELS).flatten().sort(descending=True).values
        x, sigma, d_teacher = trajectories(toy.teacher, sigmas, BATCH // LEVELS)
        update(adam, scm(net, x, sigma, d_teacher, r=min(1, i / 200)))
    return Result(lambda z, _: one(net)(z), others={"in two steps": two(net)})
