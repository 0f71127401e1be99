"""The Fréchet distance of two sets of features, from their means and covariances alone."""

import torch
from torch import Tensor

import disback


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [dim] and covariance [dim, dim], with divisor n - 1, of features [n, dim], in float64 on
    the CPU. Refusal where n is less than 2, or they are not finite."""
    features = features.cpu().double()
    if len(features) < 2:
        raise disback.Refusal(f"a covariance needs at least 2 images, not {len(features)}")
    if not features.isfinite().all():
        raise disback.Refusal("features are not finite: the network that made them is broken")
    return features.mean(dim=0), features.T.cov()


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)), the squared 2-Wasserstein distance
    of two Gaussians, in float64 (Heusel et al. 2017, Eq. 6).

    The product's root has as its trace the sum of the singular values of root(cov1) root(cov2).
    That needs no root of a matrix that is not symmetric, and holds for singular covariances."""
    if mean1.shape != mean2.shape:
        raise disback.Refusal(f"features are {len(mean1)} numbers, those of the reference "
                              f"{len(mean2)}: the two must be of one network")
    mean1, cov1, mean2, cov2 = (t.double() for t in (mean1, cov1, mean2, cov2))
    apart = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
    if not (apart.isfinite() and cov1.isfinite().all() and cov2.isfinite().all()):
        raise disback.Refusal("the distance is not finite: the features, or those of the "
                              "reference, are too large; use another reference")
    return (apart - 2 * torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()).item()


def root(cov: Tensor) -> Tensor:
    """The symmetric root. Eigenvalues that rounding alone can make count as zero: their roots are
    eight digits larger than they, and a singular covariance has many."""
    values, vectors = torch.linalg.eigh(cov)
    if values.min() < -1e-6 * values.max().abs():
        raise disback.Refusal("what should be a covariance has negative eigenvalues: use another "
                              "reference")
    noise = values.max() * len(cov) * torch.finfo(cov.dtype).eps
    return vectors * torch.where(values > noise, values, 0).sqrt() @ vectors.T
