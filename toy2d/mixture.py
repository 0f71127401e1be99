"""A mixture of Gaussians whose density, score and denoiser are exact at every sigma.

Noising is convolution with a Gaussian, so p_sigma is again a mixture, with variances
std**2 + sigma**2. That makes both halves of the score mismatch measurable, not only plottable:
the teacher's error where the student is, and the fake's error on the student's own distribution.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Weights [m] that sum to 1, means [m, d] and standard deviations [m, d] of the modes, whose
    covariances are diagonal."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @staticmethod
    def of_samples(x0: Tensor) -> "Mixture":
        """The distribution of samples [m, d]: m point masses, whose noised score is exact for
        these samples and, as m grows, for the distribution that they were drawn from."""
        m = len(x0)
        return Mixture(x0.new_full((m,), 1 / m), x0, torch.zeros_like(x0))

    @property
    def dims(self) -> int:
        return self.means.shape[1]

    def plane(self) -> "Mixture":
        """The distribution of the first two coordinates."""
        return Mixture(self.weights, self.means[:, :2], self.stds[:, :2])

    def sample(self, n: int) -> Tensor:
        """n independent samples [n, d]."""
        mode = torch.multinomial(self.weights, n, replacement=True)
        return self.means[mode] + self.stds[mode] * torch.randn(n, self.dims)

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p_sigma(x): [n] for x [n, d] and sigma a number or [n, 1], sigma >= 0."""
        return self._log_joint(x, sigma).logsumexp(dim=1)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] [n, d], the denoiser that score matching would learn with unlimited means."""
        posterior = self._log_joint(x, sigma).softmax(dim=1)  # p(mode | x) [n, m]
        shrink = self.stds**2 / self._variance(sigma)
        of_modes = self.means + shrink * (x[:, None] - self.means)  # E[x0 | x, mode] [n, m, d]
        return (posterior[:, :, None] * of_modes).sum(dim=1)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log p_sigma(x) [n, d] = (D(x, sigma) - x) / sigma**2 (Tweedie), sigma > 0."""
        return (self.denoise(x, sigma) - x) / sigma**2

    def nearest_mode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index [n] of the nearest mode, counted in its standard deviations, and that distance."""
        distance, mode = ((x[:, None] - self.means) / self.stds).norm(dim=2).min(dim=1)
        return mode, distance

    def _log_joint(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log of weight times density of each noised mode [n, m]."""
        variance = self._variance(sigma)
        exponent = (x[:, None] - self.means) ** 2 / variance + (2 * math.pi * variance).log()
        return self.weights.log() - exponent.sum(dim=2) / 2

    def _variance(self, sigma: Tensor | float) -> Tensor:
        """Of the noised modes: [m, d] for a number, [n, m, d] for sigma [n, 1]."""
        return self.stds**2 + (sigma[:, :, None] if isinstance(sigma, Tensor) else sigma) ** 2


def round_modes(weights: Tensor, means: Tensor, stds: Tensor) -> Mixture:
    """Modes in the plane with one standard deviation [m] each."""
    return Mixture(weights, means, stds[:, None].expand(-1, 2))


def ring() -> Mixture:
    """Eight equal modes on a circle of radius 2."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return round_modes(torch.full((8,), 1 / 8), means, torch.full((8,), 0.15))


def ring16() -> Mixture:
    """The ring in the first two of 16 dimensions; across the others the data are thin."""
    flat = ring()
    thin = torch.zeros(8, 14)
    return Mixture(flat.weights, torch.cat([flat.means, thin], dim=1),
                   torch.cat([flat.stds, thin + 0.02], dim=1))


def grid() -> Mixture:
    """Sixteen equal modes on a 4 x 4 grid of pitch 1.2."""
    axis = 1.2 * (torch.arange(4) - 1.5)
    return round_modes(torch.full((16,), 1 / 16), torch.cartesian_prod(axis, axis),
                       torch.full((16,), 0.12))


def uneven() -> Mixture:
    """Five modes of unequal weight and width: what a reverse KL divergence finds hard."""
    weights = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    means = torch.tensor([[-1.5, 1.0], [1.6, 1.4], [1.2, -1.6], [-1.4, -1.5], [0.0, 0.2]])
    return round_modes(weights, means, torch.tensor([0.35, 0.15, 0.25, 0.1, 0.1]))
