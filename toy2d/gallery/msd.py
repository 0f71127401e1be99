"""MSD (arXiv 2410.23274): several students, each for a part of the conditions.

Claim: K one-step students, of which one runs at a time, beat a single one of the same latency,
each being trained by VSD on its own labels. Asked: S, each student's samples, noised.
Lost in 2D: "teacher score matching", which first teaches a small student to denoise; our student is
no denoiser. The effect can only show where capacity binds: the students have 8 units a layer.
As in the paper the batch is split, not the iterations. Known from summaries; no code was found.
"""

import torch
from torch import Tensor, nn

from toy2d.gallery.conditional import CLASSES, teacher
from toy2d.gallery.core import BATCH, STAGE1, Result, Toy, average, dsm, loop, update, vsd
from toy2d.gallery.vsd import Generator

NAME, QUERIES, START, STEPS, BACKTRACK = "MSD (4 students, 8 units)", "S", "off", 1, True
VARIANTS = {"one student": {"students": 1}}


def distilled(toy: Toy, labels: Tensor, batch: int, width: int) -> nn.Module:
    """The moving average of a student of these labels."""
    student = Generator(width, CLASSES)
    ema = average(student)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        label = labels[torch.randint(len(labels), (n,))]
        return student(torch.randn(n, 2), label), label

    target, fake, walk = toy.nets(draw, teacher(toy).requires_grad_())
    adam, adam_fake = toy.adam(student, 2.4e-2), toy.adam(fake, 6e-3)
    for _ in loop(toy.steps(1500, 8, STAGE1 * BATCH / batch), adam, adam_fake):
        x0, label = draw(batch)
        loss, mismatch = vsd(x0, toy.sigma(batch), fake, target, cond=label)
        update(adam, loss)
        ema.update_parameters(student)
        update(adam_fake, dsm(fake, x0.detach(), toy.sigma(batch), label))
        walk.step(mismatch)
    return ema


def train(toy: Toy, students: int = 4, width: int = 8) -> Result:
    parts = torch.arange(CLASSES).chunk(students)  # labels that are near stay together
    nets = [distilled(toy, part, BATCH // students, width) for part in parts]

    def sample(z: Tensor, generator: torch.Generator) -> Tensor:
        label = torch.randint(CLASSES, (len(z),), generator=generator)
        x0 = torch.empty_like(z)
        for part, net in zip(parts, nets):
            mine = torch.isin(label, part)
            x0[mine] = net(z[mine], label[mine])
        return x0

    return Result(sample)
