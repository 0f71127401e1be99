"""Phased DMD (arXiv 2510.27684, Eq. 11 to 13): an expert for each interval of the noise.

Claim: few-step students are better as experts, of which the k-th maps level b_(k-1) to b_k, and a
score can be matched at b without ever seeing a clean sample. Source: the paper, and lightx2v_train.
Asked: S, at intermediate levels. --backtrack walks anew in each phase, from the copy's start.
Lost in 2D: capacity; here an expert is as large as a single net. Published: 4 steps in 2 phases and
5 updates of the fake for each of the student; here 2 steps in 2 phases, and 1 update.
"""

import functools

import torch
from torch import Tensor, nn

from toy2d import metrics, problem
from toy2d.gallery.core import BATCH, HI, Result, Toy, average, loop, update, vsd
from toy2d.gallery.samplers import at, jump
from toy2d.mixture import Mixture

NAME, QUERIES, START, STEPS, BACKTRACK = "Phased DMD", "S", "copy", 2, True
MIDDLE = 1.0  # the level between the two phases


def target_of(xb: Tensor, s: Tensor, eps: Tensor, b: float) -> Tensor:
    """What the denoiser is to answer at x_b + s eps, sigma^2 = b^2 + s^2: its mean is E[x0 | x]
    though x_b has noise of level b in it. Noise s is added from b up."""
    return xb - b**2 / s * eps


def subinterval_loss(net: nn.Module, xb: Tensor, s: Tensor, cond: None = None,
                     b: float = 0.0) -> Tensor:
    """Score matching from level b up; the weight takes back that the target explodes as s -> 0."""
    eps, sigma = torch.randn_like(xb), (b**2 + s**2).sqrt()
    weight = problem.score_weight(sigma, 1.0) * (s / sigma) ** 2
    return (weight * (net(xb + s * eps, sigma) - target_of(xb, s, eps, b)) ** 2).mean()


def from_level(net: nn.Module, b: float) -> callable:
    """The denoiser as a function of x and the noise s that was added to level b."""
    return lambda x, s, cond=None: net(x, (b**2 + s**2).sqrt())


def phase(toy: Toy, begin: callable, level: float, b: float, steps: int = 800) -> nn.Module:
    """The expert that takes begin(n), points at `level`, down to b in one DDIM step."""
    student = toy.copy()
    ema = average(student)

    def draw(n: int) -> tuple[Tensor, None]:
        x = begin(n)
        return jump(x, student(x, at(x, level)), level, b), None

    target, fake, walk = toy.nets(draw, loss=functools.partial(subinterval_loss, b=b))
    adam, adam_fake = toy.adam(student, 2e-3), toy.adam(fake, 6e-3)
    for _ in loop(toy.steps(steps, 8), adam, adam_fake):
        xb, s = draw(BATCH)[0], toy.sigma()
        loss, mismatch = vsd(xb, s, from_level(fake, b), from_level(target, b), "x0",
                             scale=(b**2 + s**2).rsqrt())
        update(adam, loss)
        ema.update_parameters(student)
        update(adam_fake, subinterval_loss(fake, xb.detach(), toy.sigma(), b=b))
        walk.step(mismatch)
    return ema


def train(toy: Toy) -> Result:
    def middle(z: Tensor) -> Tensor:
        return jump(HI * z, first(HI * z, at(z, HI)), HI, MIDDLE).detach()

    first = phase(toy, lambda n: HI * torch.randn(n, 2), HI, MIDDLE)
    second = phase(toy, lambda n: middle(torch.randn(n, 2)), MIDDLE, 0.0)
    stds = (toy.data.stds**2 + MIDDLE**2).sqrt()
    there = metrics.Evaluation(Mixture(toy.data.weights, toy.data.means, stds))
    return Result(lambda z, _: second(middle(z), at(z, MIDDLE)),
                  numbers={"SWD at the middle level": there.of(middle(toy.evaluate.z))["swd"]})
