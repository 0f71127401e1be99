"""MDT-dist (arXiv 2509.04406): mean velocities matched (VM), and "velocity distillation" (VD).

Claim: with d = du / ds in the place of a fake, VD distils the distribution. Source:
Zanue/MDT-dist flow_matching_mdt.py. Asked: X in VM, S in VD, where --backtrack lets the target
walk. In flow time x_s = (1 - s) x0 + s eps, and u = (x_s - f) / s is the mean velocity down to 0.
What the paper does not say: (v_T - s d) - u = df / ds. So VM is continuous-time consistency of
weight 1 / s^2, and VD, -df / ds at the student's samples, vanishes as soon as the student is
consistent there, whatever its distribution. Lost in 2D: 3D shapes, guidance of 40 and 100.
Differs from the code: d comes from jvp, and is not normalised, which would move the fixed point;
VD has weight 0.1 and the second half. "as published" is the code's.
"""

import torch
from torch import Tensor, nn

from toy2d.gallery.core import BATCH, HI, Result, Toy, loop
from toy2d.gallery.samplers import at, one

NAME, QUERIES, START, STEPS, BACKTRACK = "MDT-dist", "X + S", "copy", 1, True
VARIANTS = {"as published": {"vd": 1.0, "normalised": True, "begin": 0, "steps": 1000},
            "VM alone": {"vd": 0.0}}
S_MAX = HI / (1 + HI)


def flow_time(n: int) -> Tensor:
    """s [n, 1], mostly near S_MAX."""
    return 0.01 + (S_MAX - 0.01) * torch.sigmoid(1 + torch.randn(n, 1))


def velocity(net: nn.Module, xs: Tensor, s: Tensor) -> Tensor:
    """u or v_T: (x_s - D) / s, where D is asked at x_s / (1 - s) and sigma = s / (1 - s)."""
    return (xs - net(xs / (1 - s), s / (1 - s))) / s


@torch.no_grad()
def derivative(net: nn.Module, xs: Tensor, s: Tensor, v: Tensor, normalised: bool) -> Tensor:
    """d = du / ds along dx_s / ds = v."""
    _, d = torch.func.jvp(lambda xs, s: velocity(net, xs, s), (xs, s), (v, torch.ones_like(s)))
    return d / (d.norm(dim=1, keepdim=True) + 0.1) if normalised else d


def matching(net: nn.Module, teacher: nn.Module, x0: Tensor, normalised: bool) -> Tensor:
    """VM at noised data."""
    s = flow_time(len(x0))
    xs = (1 - s) * x0 + s * torch.randn_like(x0)
    v = velocity(teacher, xs, s)
    right = v - s * derivative(net, xs, s, v, normalised)
    return (velocity(net, xs, s) - right).square().mean()


def distillation(net: nn.Module, target: nn.Module, z: Tensor, normalised: bool) -> Tensor:
    """VD: its gradient, 2 G, reaches the velocity that generates alone."""
    top = at(z, S_MAX)
    u = velocity(net, S_MAX * z, top)
    with torch.no_grad():
        s, xf = flow_time(len(z)), S_MAX * (z - u)
        xs = (1 - s) * xf + s * torch.randn_like(xf)
        v = velocity(target, xs, s)
        g = velocity(net, xs, s) - v + s * derivative(net, xs, s, v, normalised)
    return (g + u - u.detach()).square().mean()


def train(toy: Toy, vd: float = 0.1, normalised: bool = False, begin: int = 1000,
          steps: int = 2000) -> Result:
    net = toy.copy()
    adam = toy.adam(net, 1e-3, 0.9, 0.99)
    walk = None
    for i in loop(toy.steps(steps, 14), adam):
        loss = matching(net, toy.teacher, toy.data.sample(BATCH), normalised)
        if vd and i >= begin:
            if walk is None:
                target, _, walk = toy.nets(lambda n: (one(net)(torch.randn(n, 2)), None))
            loss = loss + vd * distillation(net, target, torch.randn(BATCH, 2), normalised)
            walk.step()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        adam.step()
    return Result(lambda z, _: one(net)(z))
