"""The Fréchet distance of two sets of features, from their means and covariances alone."""

import torch
from torch import Tensor

import disback
from runtime.errors import blame, must


class Statistics:
    """Number, mean and covariance of features [n, dim] that come in batches and are not kept.

    In float64, on the CPU. Batches are merged by their means and centred sums (Chan, Golub and
    LeVeque 1979), which loses no digits where the mean is large."""

    def __init__(self, dim: int):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (f - mean)(f - mean)^T

    def add(self, features: Tensor) -> None:
        """Take in features [n, dim], n >= 0, of any device and precision."""
        if features.shape[1:] != self.mean.shape:
            raise disback.Refusal(f"features are {list(features.shape[1:])} numbers, those of the "
                                  f"reference {len(self.mean)}: the two must be of one network")
        if len(features) == 0:
            return
        features = features.cpu().double()
        if not features.isfinite().all():
            raise disback.Refusal("features are not finite: the network that made them is broken")
        mean, total = features.mean(dim=0), self.n + len(features)
        centred, shift = features - mean, mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(shift, shift) * (self.n * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.n = total

    @property
    def cov(self) -> Tensor:
        """The covariance [dim, dim] with divisor n - 1; Refusal where there are fewer than 2."""
        if self.n < 2:
            raise disback.Refusal(f"a covariance needs at least 2 images, not {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)), the squared 2-Wasserstein distance
    of two Gaussians, in float64 (Heusel et al. 2017, Eq. 6).

    The product's root has as its trace the sum of the singular values of root(cov1) root(cov2).
    That needs no root of a matrix that is not symmetric, and holds for singular covariances."""
    mean1, cov1, mean2, cov2 = (t.double() for t in (mean1, cov1, mean2, cov2))
    apart = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
    with blame("the distance cannot be computed: use another reference"):
        must(apart.isfinite() and cov1.isfinite().all() and cov2.isfinite().all(), "it is not "
             "finite: the features, or those of the reference, are too large")
        return (apart - 2 * torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()).item()


def root(cov: Tensor) -> Tensor:
    """The symmetric root; ValueError where there is none. Eigenvalues that rounding alone can make
    count as zero: their roots are eight digits larger than they, and a singular covariance has
    many."""
    values, vectors = torch.linalg.eigh(cov)
    must(values.min() >= -1e-6 * values.max().abs(), "a covariance has negative eigenvalues")
    noise = values.max() * len(cov) * torch.finfo(cov.dtype).eps
    return vectors * torch.where(values > noise, values, 0).sqrt() @ vectors.T
