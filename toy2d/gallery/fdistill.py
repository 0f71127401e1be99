"""f-distill (arXiv 2502.15681): VSD for any f-divergence.

Claim: VSD's gradient, that of the reverse KL, becomes that of another divergence if it is weighted
by h(r) = r^2 f''(r), with r = p_data / p_student at the noised point from a critic. Source:
NVlabs/FastGen f_distill.py. Asked: S for the teacher; the critic needs data, and with --backtrack
samples of the present node, as the ratio must belong to the target.
Lost in 2D: the critic is nearly exact, so that the forward KL's variance is missing. The paper's
GAN loss is left out, so that the row shows the weighting alone.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from toy2d import model
from toy2d.gallery.core import BATCH, HI, STAGE1, Result, Toy, average, dsm, loop, update, vsd
from toy2d.gallery.samplers import levels, ode
from toy2d.gallery.vsd import Generator

NAME, QUERIES, START, STEPS, BACKTRACK = "f-distill (Jensen-Shannon)", "S", "off", 1, True
VARIANTS = {"forward KL": {"divergence": "FKL"}, "uneven data": {"data": "uneven"},
            "uneven data, reverse KL": {"data": "uneven", "divergence": "RKL"}}
WEIGHTS = {"RKL": torch.ones_like, "FKL": lambda r: r, "JS": lambda r: r / (1 + r)}  # h(r)
NODES = 9 * 35 * 8  # the cost of 4,096 samples of every node on the way, for a sample of the batch


class Critic(nn.Module):
    """The logit [n, 1] that x at sigma is noised data, and not a student's sample."""

    def __init__(self):
        super().__init__()
        self.net = model.mlp(2 + 8, 1, 128, 2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        phase = sigma.log() / 4 * 2.0 ** torch.arange(4)
        return self.net(torch.cat([x * (1 + sigma**2).rsqrt(), phase.sin(), phase.cos()], dim=1))


def critic_loss(critic: Critic, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    """Logistic; its best logit is the log of the ratio of the noised densities."""
    noised = [x + sigma * torch.randn_like(x) for x in (real, fake)]
    return (softplus(-critic(noised[0], sigma)) + softplus(critic(noised[1], sigma))).mean()


def ratio(critic: Critic, x: Tensor, sigma: Tensor) -> Tensor:
    with torch.no_grad():
        return critic(x, sigma).clamp(-10, 10).exp().clamp(0.1, 20)


def train(toy: Toy, divergence: str = "JS") -> Result:
    student = Generator()
    ema = average(student)
    target, fake, walk = toy.nets(lambda n: (student(torch.randn(n, 2)), None))
    with torch.random.fork_rng():  # the critic's own random numbers: "RKL" is VSD to the bit
        critic, real = Critic(), None
    adam, adam_fake = toy.adam(student, 6e-3), toy.adam(fake, 6e-3)
    adam_critic = toy.adam(critic, 2e-3)
    switched = walk.node > 0
    for i in loop(toy.steps(1000, 15, STAGE1 + NODES), adam, adam_fake, adam_critic):
        x0, sigma = student(torch.randn(BATCH, 2)), toy.sigma()
        eps = torch.randn_like(x0)
        h = WEIGHTS[divergence](ratio(critic, x0.detach() + sigma * eps, sigma))
        loss, mismatch = vsd(x0, sigma, fake, target, eps=eps, scale=h / h.mean())
        update(adam, loss)
        ema.update_parameters(student)
        update(adam_fake, dsm(fake, x0.detach(), toy.sigma()))
        with torch.random.fork_rng():
            torch.manual_seed(toy.seed * 10**6 + i)
            if switched:
                real = node_samples(target) if walk.node else None
            some = toy.data.sample(BATCH) if real is None else real[torch.randint(4096, (BATCH,))]
            update(adam_critic, critic_loss(critic, some, x0.detach(), toy.sigma()))
        switched = walk.step(mismatch)
    return Result(lambda z, _: ema(z))


@torch.no_grad()
def node_samples(target: nn.Module) -> Tensor:
    return ode(target, HI * torch.randn(4096, 2), levels(18))
