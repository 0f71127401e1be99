"""A multilayer perceptron, and the denoiser that EDM's preconditioning makes of it."""

import torch
from torch import Tensor, nn


class Perceptron(nn.Sequential):
    """With `bf16` it computes in that; its weights and its answers are float32 all the same."""

    bf16 = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.bf16:
            return super().forward(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x).float()


def mlp(inputs: int, width: int, depth: int) -> Perceptron:
    """`depth` hidden layers of `width` units, from [n, inputs] to [n, 2]."""
    sizes = [inputs] + depth * [width]
    hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
    return Perceptron(*hidden, nn.Linear(width, 2))


class Denoiser(nn.Module):
    """D(x, sigma, cond) -> x0 for points x [n, 2] and sigma [n, 1] > 0; cond is not used.

    The raw network sees inputs of unit variance and predicts an output of unit variance; c_skip
    keeps D close to x where there is little noise to remove (Karras et al. 2022, Table 1).
    """

    def __init__(self, width: int, depth: int, sigma_data: float):
        super().__init__()
        self.sigma_data = sigma_data
        self.register_buffer("frequencies", 2.0 ** torch.arange(4), persistent=False)
        self.net = mlp(2 + 2 * len(self.frequencies), width, depth)

    def forward(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        phase = sigma.log() / 4 * self.frequencies  # c_noise in octaves [n, 4]
        features = torch.cat([c_in * x, phase.sin(), phase.cos()], dim=1)
        return c_skip * x + c_out * self.net(features)
