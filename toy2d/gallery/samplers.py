"""How teachers and students are sampled; a sigma without a shape is a number."""

from collections.abc import Callable

import torch
from torch import Tensor

from toy2d.gallery.core import HI, LO


def at(x: Tensor, sigma: float) -> Tensor:
    return x.new_full((len(x), 1), sigma)


def one(net: Callable) -> Callable:
    """z -> D(HI z, HI), the one-step sampler of a denoiser-shaped student."""
    return lambda z, generator=None: net(HI * z, at(z, HI))


def two(net: Callable) -> Callable:
    """The two-step sampler of a denoiser-shaped student, by way of sigma 0.8."""
    def sample(z: Tensor, generator: torch.Generator) -> Tensor:
        x0 = net(HI * z, at(z, HI))
        return net(x0 + 0.8 * torch.randn(z.shape, generator=generator), at(z, 0.8))

    return sample


def lognormal(n: int, mean: float = -0.8, std: float = 1.6) -> Tensor:
    """Noise levels [n, 1] of the trajectory methods."""
    return (mean + std * torch.randn(n, 1)).exp().clamp(LO, HI)


def jump(x: Tensor, d: Tensor, sigma: Tensor | float, lower: Tensor | float) -> Tensor:
    """One DDIM step, from x at sigma down to `lower`, where the denoiser answered d."""
    return d + lower / sigma * (x - d)


def levels(n: int, hi: float = HI, lo: float = LO) -> list[float]:
    """n Karras levels from hi to lo, and 0."""
    return [*torch.linspace(hi ** (1 / 7), lo ** (1 / 7), n).pow(7).tolist(), 0.0]


def ode(net: Callable, x: Tensor, sigmas: list[float], heun: bool = True, cond=None) -> Tensor:
    """The probability-flow ODE through `sigmas`, by Heun's method or Euler's."""
    for sigma, lower in zip(sigmas, sigmas[1:]):
        slope = (x - net(x, at(x, sigma), cond)) / sigma
        euler = x + (lower - sigma) * slope
        if heun and lower > 0:
            second = (euler - net(euler, at(x, lower), cond)) / lower
            euler = x + (lower - sigma) * (slope + second) / 2
        x = euler
    return x
