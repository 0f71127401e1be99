"""A denoiser that takes a label, its teacher, and guidance."""

import hashlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from runtime import files
from toy2d import mixture, model, problem
from toy2d.gallery.core import BATCH, Toy, dsm, loop, update

CLASSES = 4  # modes 2k and 2k + 1 of the ring, which are neighbours; the null label is 4


class Conditional(model.Denoiser):
    """D(x, sigma, label [n]) -> x0; no label is the null label."""

    def __init__(self, width: int = 128):
        super().__init__(width, 3, sigma_data=1.0)
        self.net = model.mlp(2 + 8 + CLASSES + 1, 2, width, 3)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        label = torch.full((len(x),), CLASSES) if cond is None else cond
        variance, phase = sigma**2 + 1, sigma.log() / 4 * self.frequencies
        features = [x * variance.rsqrt(), phase.sin(), phase.cos(), one_hot(label, CLASSES + 1)]
        return x / variance + sigma * variance.rsqrt() * self.net(torch.cat(features, dim=1))


def dropped(label: Tensor, p: float = 0.1) -> Tensor:
    """The labels, of which the share p becomes the null label."""
    return torch.where(torch.rand(len(label)) < p, CLASSES, label)


def teacher(toy: Toy, steps: int = 3000) -> nn.Module:
    """The conditional teacher from the cache, or trained into it."""
    parts = model, mixture, Conditional, teacher, problem.karras_sigma, problem.score_weight
    source = "".join(map(inspect.getsource, parts)) + torch.__version__
    file = files.cached(f"gallery-{hashlib.sha256(source.encode()).hexdigest()[:16]}.safetensors")
    with torch.random.fork_rng():  # the run's own numbers do not depend on the cache
        torch.manual_seed(0)
        net = Conditional()
        adam = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
        for _ in loop(0 if file.exists() else steps, adam):
            x0 = toy.data.sample(BATCH)
            update(adam, dsm(net, x0, toy.sigma(), dropped(toy.data.nearest_mode(x0)[0] // 2)))
    if not file.exists():
        files.save_tensors(file, net.state_dict())
    files.load_net(file, net, "remove it, and the next run trains the teacher again")
    return net.requires_grad_(False)


def guided(net: Callable, scale: Tensor | float) -> Callable:
    """Classifier-free guidance, D(null) + scale * (D(label) - D(null)); scale may be [n, 1]."""
    def answer(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        null = net(x, sigma)
        return null + scale * (net(x, sigma, cond) - null)
    return answer
