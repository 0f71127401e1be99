"""InstaFlow (arXiv 2309.06380, Alg. 1 and 2): straighten the flow, then distil its pairs.

Claim: after reflow, which trains on the teacher's own pairs of noise and sample, the trajectories
are so straight that one step can be regressed. Asked: J, the teacher's trajectories.
Lost in 2D: guidance inside reflow, and LPIPS, which is a square here.
"""

import torch
from torch import Tensor, nn

from toy2d.gallery.core import BATCH, HI, Result, Toy, dsm, loop, update
from toy2d.gallery.samplers import at, levels, lognormal, ode, one

NAME, QUERIES, START, STEPS, BACKTRACK = "InstaFlow", "J", "copy", 1, False
VARIANTS = {"without reflow": {"reflow": False}}


def train(toy: Toy, reflow: bool = True) -> Result:
    net, numbers = toy.copy(), {}
    others = {"the teacher in one step": lambda z, _: one(toy.teacher)(z),
              "the teacher in 40 Heun steps": lambda z, _: ode(toy.teacher, HI * z, levels(40))}
    z, x0 = pairs(net)
    if reflow:
        numbers["straightness before"] = straightness(net, z, x0)
        straighten(toy, net, z, x0)
        z, x0 = pairs(net)
        numbers["straightness"] = straightness(net, z, x0)
        kept = {name: weight.clone() for name, weight in net.state_dict().items()}
        others["reflow only"] = lambda z, _: torch.func.functional_call(
            net, kept, (HI * z, at(z, HI)))
    distil(toy, net, z, x0)
    return Result(lambda z, _: one(net)(z), others=others, numbers=numbers)


@torch.no_grad()
def pairs(net: nn.Module, n: int = 20_000) -> tuple[Tensor, Tensor]:
    """Noise z [n, 2] and where the flow of `net` ends from HI z."""
    z = torch.randn(n, 2)
    return z, ode(net, HI * z, levels(18))


def straighten(toy: Toy, net: nn.Module, z: Tensor, x0: Tensor, steps: int = 1000) -> None:
    """Reflow: denoise along the line from x0 to HI z, where HI z itself is the point of HI."""
    adam = toy.adam(net, 1e-3, 0.9, 0.99)
    for _ in loop(steps, adam):
        i = torch.randint(len(z), (BATCH,))
        update(adam, dsm(net, x0[i], toy.sigma(), eps=z[i] - x0[i] / HI))


def distil(toy: Toy, net: nn.Module, z: Tensor, x0: Tensor, steps: int = 1000) -> None:
    """Regress the one-step sampler on the pairs."""
    adam = toy.adam(net, 1e-3, 0.9, 0.99)
    for _ in loop(steps, adam):
        i = torch.randint(len(z), (BATCH,))
        update(adam, (one(net)(z[i]) - x0[i]).square().mean())


@torch.no_grad()
def straightness(net: nn.Module, z: Tensor, x0: Tensor) -> float:
    """E|(HI z - x0) / HI - v|^2 on the line between a pair, where v = (x - D) / sigma is the slope:
    0 where the flow is straight."""
    sigma = lognormal(len(z))
    x = x0 + sigma * (z - x0 / HI)
    v = (x - net(x, sigma)) / sigma
    return ((HI * z - x0) / HI - v).square().sum(dim=1).mean().item()
