"""How far the student's samples are from the data."""

import numpy as np
import torch
from torch import Tensor, nn

from toy2d.mixture import Mixture


class Evaluation:
    """evaluation(student) -> metrics of 10,000 samples against as many of the data, both from fixed
    random numbers of its own, so that evaluating changes nothing in training."""

    samples, projections = 10_000, 64

    def __init__(self, data: Mixture):
        self.plane = data.plane()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.z = torch.randn(self.samples, data.dims)
            self.reference = self.plane.sample(self.samples)
        angles = torch.arange(self.projections) * (torch.pi / self.projections)
        self.directions = torch.stack([angles.cos(), angles.sin()])  # [2, projections]
        self.sorted_reference = (self.reference @ self.directions).sort(dim=0)[0]

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> dict[str, float]:
        device = next(student.parameters()).device
        return self.of(student(self.z.to(device)).cpu())

    def of(self, x: Tensor) -> dict[str, float]:
        """The metrics of samples x [10,000, d], in the plane of their first two coordinates.

        swd: sliced 2-Wasserstein distance. energy_distance: of the first 1,000 samples. mode_tv:
        total variation between the shares of samples nearest to each mode and the modes' weights.
        off_mode: share of samples further than 4 standard deviations from every mode (of the
        data's own: 0.0003). modes_missed: modes with less than a fifth of their weight's samples.
        In more dimensions off_plane is the root mean square of the distances from that plane, and
        part of swd, added in squares.
        """
        x, others = x[:, :2], x[:, 2:]
        # NumPy's sort is six times faster than torch's on the CPU, and gives the same bits.
        projected = torch.from_numpy(np.sort((x @ self.directions).numpy(), axis=0))
        swd = (projected - self.sorted_reference).square().mean().sqrt()
        mode, distance = self.plane.nearest_mode(x)
        shares = torch.bincount(mode, minlength=len(self.plane.weights)) / len(x)
        a, b = x[:1000], self.reference[:1000]
        energy = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
        off_plane = others.square().sum(dim=1).mean().sqrt()  # 0 where there are two dimensions
        return {"swd": swd.hypot(off_plane).item(), "energy_distance": energy.item(),
                "mode_tv": (shares - self.plane.weights).abs().sum().item() / 2,
                "off_mode": (distance > 4).float().mean().item(),
                "modes_missed": int((shares < self.plane.weights / 5).sum()),
                **({"off_plane": off_plane.item()} if others.numel() else {})}
