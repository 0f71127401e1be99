"""A mixture of isotropic Gaussians whose density, score and denoiser are exact at every sigma.

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
    """Weights [m] that sum to 1, means [m, 2] and standard deviations [m] of the modes."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @staticmethod
    def of_samples(x0: Tensor) -> "Mixture":
        """The distribution of samples [m, 2]: m point masses, whose noised score is exact for
        these samples and, as m grows, for the distribution that they were drawn from."""
        m = len(x0)
        return Mixture(x0.new_full((m,), 1 / m), x0, x0.new_zeros(m))

    def sample(self, n: int) -> Tensor:
        """n independent samples [n, 2]."""
        mode = torch.multinomial(self.weights, n, replacement=True)
        return self.means[mode] + self.stds[mode, None] * torch.randn(n, 2)

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p_sigma(x): [n] for x [n, 2] and sigma a number or [n, 1], sigma >= 0."""
        return self._log_joint(x, sigma).logsumexp(dim=1)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] [n, 2], the denoiser that score matching would learn with unlimited means."""
        posterior = self._log_joint(x, sigma).softmax(dim=1)  # p(mode | x) [n, m]
        shrink = self.stds**2 / (self.stds**2 + sigma**2)  # [m] or [n, m]
        a = posterior * shrink
        return a.sum(dim=1, keepdim=True) * x + (posterior - a) @ self.means

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log p_sigma(x) [n, 2] = (D(x, sigma) - x) / sigma**2 (Tweedie), sigma > 0."""
        return (self.denoise(x, sigma) - x) / sigma**2

    def nearest_mode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index [n] of the nearest mode, counted in its standard deviations, and that distance."""
        distance, mode = (torch.cdist(x, self.means) / self.stds).min(dim=1)
        return mode, distance

    def _log_joint(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log of weight times density of each noised mode [n, m]."""
        variance = self.stds**2 + sigma**2  # [m] or [n, m]
        # The direct form of cdist: the default one loses all digits far off the modes.
        distance2 = torch.cdist(x, self.means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        return self.weights.log() - distance2 / (2 * variance) - (2 * math.pi * variance).log()


def ring() -> Mixture:
    """Eight equal modes on a circle of radius 2."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Mixture(torch.full((8,), 1 / 8), means, torch.full((8,), 0.15))


def grid() -> Mixture:
    """Sixteen equal modes on a 4 x 4 grid of pitch 1.2."""
    axis = 1.2 * (torch.arange(4) - 1.5)
    return Mixture(torch.full((16,), 1 / 16), torch.cartesian_prod(axis, axis),
                   torch.full((16,), 0.12))


def uneven() -> Mixture:
    """Five modes of unequal weight and width: what a reverse KL divergence finds hard."""
    weights = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    means = torch.tensor([[-1.5, 1.0], [1.6, 1.4], [1.2, -1.6], [-1.4, -1.5], [0.0, 0.2]])
    return Mixture(weights, means, torch.tensor([0.35, 0.15, 0.25, 0.1, 0.1]))
