"""HiPA (arXiv 2311.18158), an analogue on 1-D signals.

Claim: a low-rank patch of a frozen diffusion model, trained with a loss of its own for the high
frequencies, makes one step give what the model's many steps give. Asked: J, the model's own
trajectories, paired by noise. Here a signal of 16 points is cos(2 pi (n / 16 + a)) +
cos(2 pi (5 n / 16 + b)) / 2 with random a and b; squares stand for a perceptual distance (DISTS).
Lost: perception, text, and the cost of training. The problem, not only its size, is ours.
"""

import math

import torch
from torch import Tensor, nn

import disback
from toy2d import model, problem
from toy2d.gallery.core import BATCH, Result, Toy, loop, update
from toy2d.gallery.lora import lora
from toy2d.gallery.samplers import at, levels, ode

NAME, QUERIES, START, STEPS, BACKTRACK = "HiPA", "J", "copy", 1, False
CLAIM = "high amplitude (1 is right): one step → patched (check: by the squared error alone)"
N, BEGIN, STD = 16, 4.0, 0.8  # points, sigma at which the one step begins, deviation of the data
WAVES = ((1, 1.0), (5, 0.5))  # frequency and amplitude


def signals(n: int) -> Tensor:
    """Clean signals [n, 16]."""
    turns = torch.arange(N) / N
    return sum(size * (2 * math.pi * (k * turns + torch.rand(n, 1))).cos() for k, size in WAVES)


def amplitudes(x: Tensor) -> list[float]:
    """The mean amplitude of each wave in x [n, 16], over the right one."""
    spectrum = torch.fft.rfft(x.detach()).abs() * 2 / N
    return [spectrum[:, k].mean().item() / size for k, size in WAVES]


def high(x: Tensor) -> Tensor:
    """x without its frequencies up to 3."""
    return torch.fft.irfft(torch.fft.rfft(x) * (torch.arange(N // 2 + 1) > 3), N)


def once(net: nn.Module, z: Tensor) -> Tensor:
    """The one-step sampler."""
    return net(BEGIN * z, at(z, BEGIN))


def pretrain(toy: Toy, steps: int = 3000) -> nn.Module:
    """The frozen model, by denoising score matching."""
    net = model.Denoiser(192, 3, STD, N)
    adam = toy.adam(net, 2e-3, 0.9)
    for _ in loop(steps, adam):
        sigma = toy.sigma()
        weight = problem.score_weight(sigma, STD)
        update(adam, disback.score_matching_loss(net, signals(BATCH), sigma, weight=weight))
    return net.requires_grad_(False)


def patched(toy: Toy, net: nn.Module, weight: float, steps: int = 60, rank: int = 1) -> nn.Module:
    """The model with adapters; `weight` is that of the high frequencies' loss."""
    z, net = torch.randn(8 * BATCH, N), lora(net, rank)
    end, adam = ode(net, BEGIN * z, levels(18, BEGIN)).detach(), toy.adam(net, 1e-2, 0.9)
    for _ in loop(steps, adam):
        i = torch.randint(len(z), (BATCH,))
        error = once(net, z[i]) - end[i]
        update(adam, error.square().mean() + weight * high(error).square().mean())
    return net


def train(toy: Toy) -> Result:
    net, z = pretrain(toy), torch.randn(8 * BATCH, N)
    ends = {"one step": once(net, z), "many steps": ode(net, BEGIN * z, levels(18, BEGIN)),
            "patched": once(patched(toy, net, 10), z), "squares": once(patched(toy, net, 0), z)}
    numbers = {f"{wave}, {name}": size for name, x in ends.items()
               for wave, size in zip(("low", "high"), amplitudes(x))}
    claim = {"without": "high, one step", "with": "high, patched", "check": "high, squares"}
    return Result(numbers=numbers | {key: numbers[name] for key, name in claim.items()})
