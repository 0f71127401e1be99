"""A multilayer perceptron, the denoiser that EDM's preconditioning makes of it, and generators."""

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


def mlp(inputs: int, outputs: int, width: int, depth: int) -> Perceptron:
    """`depth` hidden layers of `width` units, from [n, inputs] to [n, outputs]."""
    sizes = [inputs] + depth * [width]
    hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
    return Perceptron(*hidden, nn.Linear(width, outputs))


class Denoiser(nn.Module):
    """D(x, sigma, cond) -> x0 for points x [n, d] and sigma [n, 1] > 0; cond is not used.

    The raw network sees inputs of unit variance and predicts an output of unit variance; c_skip
    keeps D close to x where there is little noise to remove (Karras et al. 2022, Table 1).
    """

    def __init__(self, width: int, depth: int, sigma_data: float, dims: int = 2):
        super().__init__()
        self.sigma_data = sigma_data
        self.register_buffer("frequencies", 2.0 ** torch.arange(4), persistent=False)
        self.net = mlp(dims + 2 * len(self.frequencies), dims, width, depth)

    def forward(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        phase = sigma.log() / 4 * self.frequencies  # c_noise in octaves [n, 4]
        features = torch.cat([c_in * x, phase.sin(), phase.cos()], dim=1)
        return c_skip * x + c_out * self.net(features)


class Untrained(nn.Module):
    """A generator G(z) = centre + z / 2 + MLP(z and its Fourier features) for z [n, d]: a blob
    around its centre, at a distance from the origin on the plane's diagonal, or in more than two
    dimensions on the last axis. Without the features its map is too smooth to part eight modes."""

    def __init__(self, distance: float, width: int, depth: int, dims: int = 2):
        super().__init__()
        centre = torch.zeros(dims)
        centre[[0, 1] if dims == 2 else [-1]] = distance / (2**0.5 if dims == 2 else 1)
        self.register_buffer("centre", centre)
        self.register_buffer("frequencies", 2.0 ** torch.arange(3), persistent=False)
        self.net = mlp(dims * (1 + 2 * len(self.frequencies)), dims, width, depth)

    def forward(self, z: Tensor) -> Tensor:
        phase = (self.frequencies[:, None] * z[:, None]).flatten(1)  # [n, 3 d]
        features = torch.cat([z, phase.sin(), phase.cos()], dim=1)
        return self.centre + z / 2 + self.net(features)


class TeacherCopy(nn.Module):
    """A generator G(z) = D(sigma z, sigma) for z [n, d]: the teacher's one-step denoising."""

    def __init__(self, denoiser: Denoiser, sigma: float):
        super().__init__()
        self.denoiser, self.sigma = denoiser, sigma

    def forward(self, z: Tensor) -> Tensor:
        return self.denoiser(self.sigma * z, z.new_full((len(z), 1), self.sigma))
