"""DisBack (arXiv 2408.15991, Eq. 5, 7, 8), and VSD, also called Diff-Instruct, its row without.

Claim: a target that walks back along the path on which the teacher degrades makes score
distillation faster and better. Asked: S, the student's samples, noised.
Lost in 2D: scale. "Untrained" is a blob at distance 8 here, not the copy of a UNet.
"""

import torch
from torch import Tensor, nn

from toy2d import model
from toy2d.gallery.core import BATCH, Result, Toy, average, dsm, loop, update, vsd

NAME, QUERIES, START, STEPS, BACKTRACK = "VSD → DisBack", "S", "off", 1, True


class Generator(nn.Module):
    """An untrained student G(z, label) = centre + z / 2 + MLP(z, one-hot label) for z [n, 2]: a
    blob at distance 8, the start "off"."""

    def __init__(self, width: int = 128, labels: int = 0):
        super().__init__()
        self.labels, self.net = labels, model.mlp(2 + labels, 2, width, 3)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        one_hot = [] if label is None else [nn.functional.one_hot(label, self.labels).to(z)]
        return 8 / 2**0.5 + z / 2 + self.net(torch.cat([z, *one_hot], dim=1))


def train(toy: Toy) -> Result:
    student = Generator()
    ema = average(student)
    target, fake, walk = toy.nets(lambda n: (student(torch.randn(n, 2)), None))
    adam, adam_fake = toy.adam(student, 6e-3), toy.adam(fake, 6e-3)
    for _ in loop(toy.steps(1000, cost=8), adam, adam_fake):
        x0 = student(torch.randn(BATCH, 2))
        loss, mismatch = vsd(x0, toy.sigma(), fake, target)
        update(adam, loss)
        ema.update_parameters(student)
        update(adam_fake, dsm(fake, x0.detach(), toy.sigma()))
        walk.step(mismatch)
    return Result(lambda z, _: ema(z))
