"""PVD (arXiv 2211.15977), an analogue: one representation of a field is distilled into another.

Claim: to copy a field from inside (features, then densities too, then rendered rays) is 10 to 20
times faster than to fit its rays. Asked: -, at random points. Here 4 times the ring's density is
seen only through line integrals, as a NeRF through pixels. The teacher is a grid, fitted to them;
the student, an MLP, takes over its head. Lost: colour, view direction, occlusion. The problem, not
only its size, is ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from toy2d.gallery.core import Result, Toy, loop, update
from toy2d.gallery.fields import Field, render

NAME, QUERIES, START, STEPS, BACKTRACK = "PVD", "-", "untrained", 0, False
CLAIM = ("dB of the field in 200 steps: from rays → distilled "
         "(check: distilled through rays alone)")


def from_rays(density: Callable, right: Callable) -> Tensor:
    """The error of a density at 64 random rays of 48 points."""
    drawn = 2 * torch.pi * torch.rand(64), 6 * torch.rand(64) - 3, torch.rand(64, 48)
    return mse_loss(render(density, *drawn), render(right, *drawn))


def from_inside(student: Field, teacher: Field, share: float) -> Tensor:
    """The loss after that share of the budget: features; from a quarter on densities as well, of
    which what is beyond +-7 before softplus is clipped, as it cannot be seen; from half on rays."""
    x = 6 * torch.rand(3072, 2) - 3
    (f, d), (f_right, d_right) = student(x), teacher(x)
    inside = mse_loss(f, f_right)
    if share >= 0.25:
        inside = inside + mse_loss(d.clamp(-7, 7), d_right.clamp(-7, 7))
        inside = inside + mse_loss(softplus(d), softplus(d_right))
    return inside if share < 0.5 else 0.002 * inside + from_rays(student.density, teacher.density)


def fit(toy: Toy, field: Field, loss: Callable, steps: int = 200, lr: float = 1e-2) -> float:
    """Minimise loss(share of the steps done); how near to the truth the density comes, in dB."""
    adam, axis = toy.adam(field, lr, 0.9), torch.linspace(-3, 3, 100)
    for i in loop(steps, adam):
        update(adam, loss(i / steps))
    x = torch.cartesian_prod(axis, axis)
    right, found = 4 * toy.data.log_density(x).exp(), field.density(x).detach()
    return 10 * (right.max() ** 2 / mse_loss(found, right)).log10().item()


def train(toy: Toy) -> Result:
    def truth(x: Tensor) -> Tensor:
        return 4 * toy.data.log_density(x).exp()

    teacher, plain = Field(grid=True), Field(grid=False)
    numbers = {"teacher": fit(toy, teacher, lambda _: from_rays(teacher.density, truth), 600, 3e-2)}
    teacher.requires_grad_(False)
    numbers["without"] = fit(toy, plain, lambda _: from_rays(plain.density, truth))
    losses = {"check": lambda _: from_rays(student.density, teacher.density),
              "with": lambda share: from_inside(student, teacher, share)}
    for name, loss in losses.items():
        student = Field(False, teacher.head)
        numbers[name] = fit(toy, student, loss)
    axis = torch.linspace(-3, 3, 48)
    x = torch.cartesian_prod(axis, axis)
    fields = {"from rays": plain, "distilled": student}
    tensors = {name: field.density(x).detach() for name, field in fields.items()}
    return Result(numbers=numbers, tensors=tensors)
