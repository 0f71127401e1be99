"""SwiftBrush (arXiv 2312.05239): one text-to-image step, distilled without an image.

Claim: VSD with a LoRA of the teacher as the fake, both guided alike, needs no data. Source:
VinAIResearch/SwiftBrush train_swiftbrush.py. Asked: S, the student's samples, noised. Lost in 2D:
text, and the sharpening that makes guidance worth it. Guiding both alike does not move the optimum:
where fake = teacher the gradient is 0 for every scale.
Differs from the paper: for the pair of arms the student starts "off", with VSD's weight; the paper
starts at the teacher's copy, a variant here. The fake's loss has EDM's lambda.
"""

import copy

import torch
from torch import Tensor, nn

from toy2d.gallery.conditional import CLASSES, dropped, guided, teacher
from toy2d.gallery.core import BATCH, Result, Toy, average, dsm, loop, update, vsd
from toy2d.gallery.lora import adapters, load_adapters, lora
from toy2d.gallery.samplers import at
from toy2d.gallery.vsd import Generator

NAME, QUERIES, START, STEPS, BACKTRACK = "SwiftBrush", "S", "off", 1, True
VARIANTS = {"from the copy": {"published": True}, "fake unguided": {"guide_fake": False}}
RANK = 16


class Copy(nn.Module):
    """A student that starts as the teacher at one noise level: G(z, label) = D(5 z, 5, label)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_()

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.net(5 * z, at(z, 5.0), label)


def published_weight(sigma: Tensor) -> Tensor:
    """sigma_vp^2 (eps_T - eps_F) of the VP form is this times D_F - D_T."""
    return sigma / (1 + sigma**2)


def adapter_loss(fake: nn.Module, x0: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """The fake learns both laws, with the label and without."""
    return dsm(fake, x0, sigma, dropped(label))


def train(toy: Toy, kappa: tuple[float, float] = (3, 3), published: bool = False,
          guide_fake: bool = True) -> Result:
    """kappa: the range from which every sample draws its guidance scale."""
    student = Copy(teacher(toy)) if published else Generator(labels=CLASSES)
    ema = average(student)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(CLASSES, (n,))
        return student(torch.randn(n, 2), label), label

    target, fake, walk = toy.nets(draw, lora(teacher(toy), RANK), loss=adapter_loss,
                                  pack=adapters, load=load_adapters)
    adam, adam_fake = toy.adam(student, 2e-3 if published else 6e-3), toy.adam(fake, 6e-3)
    for _ in loop(toy.steps(1000, cost=10), adam, adam_fake):
        (x0, label), sigma = draw(BATCH), toy.sigma()
        scale = kappa[0] + (kappa[1] - kappa[0]) * torch.rand(BATCH, 1)
        weight = published_weight(sigma) if published else 1 / sigma
        loss, mismatch = vsd(x0, sigma, guided(fake, scale if guide_fake else 1),
                             guided(target, scale), "x0", label, scale=weight)
        update(adam, loss)
        ema.update_parameters(student)
        update(adam_fake, adapter_loss(fake, x0.detach(), toy.sigma(), label))
        walk.step(mismatch)
    return Result(lambda z, generator: ema(z, torch.randint(CLASSES, z[:, 0].shape,
                                                            generator=generator)))
