"""The world of pvd.py: a density in the plane that is only seen through line integrals."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, softplus


class Field(nn.Module):
    """x [n, 2] in [-3, 3]^2 -> 8 features and the density before softplus [n]. The features are
    those of a grid of 48 x 48 cells, or an MLP's; the head may be another field's."""

    def __init__(self, grid: bool, head: nn.Module | None = None):
        super().__init__()
        self.cells = nn.Parameter(0.1 * torch.randn(1, 8, 48, 48)) if grid else None
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                                 nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8))
        fresh = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 1))
        self.head = copy.deepcopy(head or fresh)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        phase = (x[:, :, None] * 2.0 ** torch.arange(4) * torch.pi / 3).flatten(1)
        features = (self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1)) if self.cells is None
                    else grid_sample(self.cells, x[None, None] / 3, align_corners=True)[0, :, 0].T)
        return features, self.head(features)[:, 0]

    def density(self, x: Tensor) -> Tensor:
        return softplus(self(x)[1])


def render(density: Callable, angle: Tensor, offset: Tensor, jitter: Tensor) -> Tensor:
    """The integrals [n] of a density along the lines x . (cos, sin)(angle) = offset, by m points
    on the chord of the disc of radius 3; jitter [n, m], 0 to 1, moves each inside its step."""
    half, m = (9 - offset**2).sqrt()[:, None], jitter.shape[1]
    t = half * ((torch.arange(m) + jitter) * 2 / m - 1)
    line = torch.complex(offset[:, None].expand_as(t), t)  # before it is turned by the angle
    x = torch.view_as_real(line * torch.polar(torch.ones_like(angle), angle)[:, None])
    return (density(x.flatten(0, 1)).view_as(t) * 2 * half).mean(1)
