"""SANA-Sprint (arXiv 2503.09641): sCM, continuous-time consistency, and a critic on top (LADD).

Claim: one tangent makes a consistency student, and an adversarial loss sharpens its one step.
Source: NVlabs/Sana train_scm_ladd.py, FastGen sCM.py. Asked: X, noised data; the critic sees the
student's samples, the teacher does not. EDM's preconditioning at sigma_data 1 is TrigFlow's
already: F = (cos x_t - f) / sin with t = atan(sigma), x_t = cos t x. Lost in 2D: stable tangents
in deep nets and bf16, a critic of the teacher's features, the learned and the prior weight.
"""

import torch
from torch import Tensor, nn

from toy2d.gallery.core import BATCH, HI, Result, Toy, loop, update
from toy2d.gallery.fdistill import Critic
from toy2d.gallery.samplers import lognormal, one, two

NAME, QUERIES, START, STEPS, BACKTRACK = "SANA-Sprint", "X", "copy", 1, False
VARIANTS = {"sCM alone": {"adv": 0.0}}


@torch.no_grad()
def tangent(net: nn.Module, x: Tensor, sigma: Tensor, d_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """d = D(x, sigma), and J = dD / dlog sigma along the ODE, where dx / dlog sigma = x - D_T."""
    return torch.func.jvp(lambda x, log_sigma: net(x, log_sigma.exp()), (x, sigma.log()),
                          (x - d_teacher, torch.ones_like(sigma)))


def scm(net: nn.Module, x: Tensor, sigma: Tensor, d_teacher: Tensor, r: float,
        c: float = 0.1) -> Tensor:
    """sCM's loss |F - F_sg - g / (|g| + c)|^2, written for f(x, sigma); r goes from 0 to 1."""
    d, j = tangent(net, x, sigma, d_teacher)
    sin, cos2 = sigma * (1 + sigma**2).rsqrt(), 1 / (1 + sigma**2)
    g = ((1 - r) * cos2 * (d - d_teacher) + r * j) / sin
    g = g / (g.norm(dim=1, keepdim=True) + c)
    return ((net(x, sigma) - d) / sin + g).square().sum(dim=1).mean()


def noised(toy: Toy) -> tuple[Tensor, Tensor, Tensor]:
    """Noised data, sigma, and the teacher's answer there."""
    sigma = lognormal(BATCH)
    x = toy.data.sample(BATCH) + sigma * torch.randn(BATCH, 2)
    return x, sigma, toy.teacher(x, sigma)


def adversarial(toy: Toy, net: nn.Module, critic: Critic, adam: torch.optim.Optimizer) -> Tensor:
    """The hinge loss of the net's answers, half of them at sigma HI; the critic learns first."""
    sigma = torch.where(torch.rand(BATCH, 1) < 0.5, HI, lognormal(BATCH))
    x0 = net(toy.data.sample(BATCH) + sigma * torch.randn(BATCH, 2), sigma)
    level = lognormal(BATCH, -0.6, 1.0)
    real, fake = (x + level * torch.randn(BATCH, 2) for x in (toy.data.sample(BATCH), x0))
    hinge = (1 - critic(real, level)).relu() + (1 + critic(fake.detach(), level)).relu()
    update(adam, hinge.mean())
    return -critic(fake, level).mean()


def train(toy: Toy, adv: float = 0.5, steps: int = 2000) -> Result:
    net = toy.copy()
    with torch.random.fork_rng():  # as below: without the critic this is sCM to the bit
        critic = Critic()
    adam, adam_critic = toy.adam(net, 1e-3, 0.9, 0.99), toy.adam(critic, 2e-3)
    for i in loop(steps, adam, adam_critic):
        x, sigma, d_teacher = noised(toy)
        loss = scm(net, x, sigma, d_teacher, r=min(1, i / 200))
        if adv:
            with torch.random.fork_rng():
                torch.manual_seed(toy.seed * 10**6 + i)
                loss = loss + adv * adversarial(toy, net, critic, adam_critic)
        update(adam, loss)
    return Result(lambda z, _: one(net)(z), others={"in two steps": two(net)})
