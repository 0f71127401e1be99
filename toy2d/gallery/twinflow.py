"""TwinFlow (arXiv 2512.05150): a flow that is its own fake, at negative times.

Claim: one net F(x_s, s, s'), the mean velocity from s to s', needs neither teacher nor fake: its
branch at -s learns the flow of its samples, and the branches' difference is VSD's gradient. Source:
inclusionAI/TwinFlow tutorials/mnist/methodes.py. Asked: S, but of itself. Lost in 2D: memory.
Differs from the tutorial: the fake branch draws fresh noise, as z again would couple its flow.
"""

import copy

import torch
from torch import Tensor, nn

import disback
from toy2d import model
from toy2d.gallery.core import BATCH, Result, Toy, loop, update
from toy2d.gallery.samplers import at

NAME, QUERIES, START, STEPS, BACKTRACK = "TwinFlow", "S, no teacher", "own flow", 1, False
VARIANTS = {"without the twin": {"twin": False}}
H = 0.01  # the step of RCGM's difference


class Flow(nn.Module):
    """F(x_s, s, s') for times [n, 1] from -1 to 1."""

    def __init__(self):
        super().__init__()
        self.net = model.mlp(2 + 2 + 16, 2, 128, 3)

    def forward(self, x: Tensor, s: Tensor, to: Tensor) -> Tensor:
        times = torch.cat([s, to], dim=1)
        phase = (times[:, :, None] * 2.0 ** torch.arange(4)).flatten(1)
        return self.net(torch.cat([x, times, phase.sin(), phase.cos()], dim=1))


def flow_loss(net: Flow, x: Tensor, sign: int = 1) -> Tensor:
    """Flow matching of x, at times of that sign, with fresh noise."""
    s, z = torch.rand(len(x), 1), torch.randn_like(x)
    return (net(s * z + (1 - s) * x, sign * s, sign * s) - (z - x)).square().mean()


def rectify(net: Flow, generated: Tensor, f: Tensor) -> Tensor:
    """Move f = F(z, 1, 0) by the difference of the branches at the noised samples z - f."""
    s = torch.rand(len(f), 1)
    y = s * torch.randn_like(f) + (1 - s) * generated
    right = (f - net(y, -s, -s) + net(y, s, s)).detach()
    return (f - right).square().mean()


def consistency(net: Flow, ema: Flow, x: Tensor, z: Tensor, s: Tensor, to: Tensor) -> Tensor:
    """RCGM: F's way from s to s' is a step h along v, then the average's in two steps."""
    xs, v, h = s * z + (1 - s) * x, z - x, (s - to).clamp(H / 10, H)
    f = net(xs, s, to)
    with torch.no_grad():
        begin, half = xs - h * v, (s - h - to) / 2
        middle = begin - half * ema(begin, s - h, to + half)
        end = middle - half * ema(middle, to + half, to)
        error = ((s - to) * f - (begin - end)) / h - v
    return (f - (f - error.clamp(-1, 1)).detach()).square().mean()


def train(toy: Toy, twin: bool = True, steps: int = 1500) -> Result:
    net = Flow()
    adam = toy.adam(net, 1e-3, 0.9, 0.99)
    for _ in loop(steps, adam):  # the pre-trained flow
        update(adam, flow_loss(net, toy.data.sample(BATCH)))
    ema, adam = copy.deepcopy(net), toy.adam(net, 1e-3, 0.9, 0.99)
    for _ in loop(steps, adam):
        x, z = toy.data.sample(BATCH), torch.randn(BATCH, 2)
        s, top = torch.rand(BATCH, 1), at(z, 1.0)
        loss = (flow_loss(net, x) + consistency(net, ema, x, z, s, s * torch.rand(BATCH, 1))
                + consistency(net, ema, x, z, top, 0 * top))
        if twin:
            f = net(z, top, 0 * top)
            generated = (z - f).detach()
            loss = loss + flow_loss(net, generated, sign=-1) + rectify(net, generated, f)
        update(adam, loss)
        disback.update_average(ema, net, 0.99)
    return Result(lambda z, _: z - net(z, at(z, 1.0), at(z, 0.0)))
