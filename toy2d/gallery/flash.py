"""Flash-DMD (arXiv 2511.20549, Eq. 4, 10 to 13, Alg. 1): a loss a noise level, then a reward.

Claim: VSD at the high level and a GAN at the low one; a fake that follows the student's weights
needs few updates; distillation is the anchor of reinforcement learning (RL). Asked: S, in the VSD
branch; with --backtrack it alone walks, while the GAN wants data all along. Lost in 2D: perception.
The critic judges points at sigma 0.1; the reward is the first coordinate, and its loophole, to
leave the ring, is honest reward hacking. Published: 4 steps; here 2. The RL numbers are those of
one step, with VSD alone as anchor. Known from notes on the paper; there is no code.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

import disback
from toy2d.gallery.core import BATCH, Result, Toy, dsm, loop, update, vsd
from toy2d.gallery.fdistill import Critic, critic_loss
from toy2d.gallery.samplers import at, one, two

NAME, QUERIES, START, STEPS, BACKTRACK = "Flash-DMD", "S", "copy", 2, True
VARIANTS = {"RL without its anchor": {"anchor": False}}
LOW, SEEN = 0.8, 0.1  # the second step's level, and the critic's


def low_step(net: nn.Module, x0: Tensor) -> Tensor:
    """The second step; the gradient of what follows stays in it."""
    return net(x0.detach() + LOW * torch.randn_like(x0), at(x0, LOW))


def gan(critic: Critic, x: Tensor) -> Tensor:
    """The generator's loss, where the critic sees its samples."""
    return softplus(-critic(x + SEEN * torch.randn_like(x), at(x, SEEN))).mean()


def preference(net: nn.Module, ref: nn.Module, z: Tensor, eps: Tensor, beta: float = 1.0) -> Tensor:
    """The best against the worst of K noisy candidates from each z, eps [K, n, 2], in likelihood
    relative to ref's; log 2 where net is ref."""
    mean, mean_ref = one(net)(z), one(ref)(z).detach()
    y = mean.detach() + LOW * eps
    reward, row = y[:, :, 0], torch.arange(len(z))
    best, worst = y[reward.argmax(0), row], y[reward.argmin(0), row]

    def gain(y: Tensor) -> Tensor:
        return ((y - mean_ref).square() - (y - mean).square()).sum(1) / (2 * LOW**2)

    return -logsigmoid(beta * (gain(best) - gain(worst))).mean()


def train(toy: Toy, anchor: bool = True) -> Result:
    net, critic = toy.copy(), Critic()
    target, fake, walk = toy.nets(lambda n: (one(net)(torch.randn(n, 2)), None))
    adam, adam_fake, adam_critic = toy.adam(net, 1e-3), toy.adam(fake, 2e-3), toy.adam(critic, 2e-3)

    def distil(with_gan: bool) -> None:
        x0 = one(net)(torch.randn(BATCH, 2))
        loss, mismatch = vsd(x0, toy.sigma(), fake, target, "dmd")
        x = low_step(net, x0) if with_gan else x0
        update(adam, loss + (0.3 * gan(critic, x) if with_gan else 0))
        if with_gan:
            real, fooled = toy.data.sample(BATCH), x.detach()
            update(adam_critic, critic_loss(critic, real, fooled, at(x, SEEN)))
        disback.update_average(fake, net, 0.99)  # towards the student's weights
        update(adam_fake, dsm(fake, x0.detach(), toy.sigma()))
        walk.step(mismatch)

    for _ in loop(toy.steps(800, 20), adam, adam_fake, adam_critic):
        distil(with_gan=True)
    ref = copy.deepcopy(net)
    adam, adam_fake, adam_rl = toy.adam(net, 1e-3), toy.adam(fake, 2e-3), toy.adam(net, 2e-4)
    for i in loop(300, adam, adam_fake, adam_rl):
        update(adam_rl, preference(net, ref, torch.randn(BATCH, 2), torch.randn(4, BATCH, 2)))
        if anchor and i % 5 == 4:
            distil(with_gan=False)
    numbers = {}
    for name, g in (("before RL", one(ref)), ("after RL", one(net))):
        numbers[f"reward {name}"] = g(toy.evaluate.z)[:, 0].mean().item()
        numbers[f"off-mode {name}"] = toy.measure(lambda z, _: g(z))["off_mode"]
    return Result(two(ref), others={"in one step": lambda z, _: one(ref)(z)}, numbers=numbers)
