"""rCM (arXiv 2510.08431): sCM and VSD together.

Claim: consistency, a forward divergence, covers the modes; VSD, a reverse one, sharpens them; one
net takes both gradients. Source: NVlabs/rcm t2v_model_distill_rcm.py. Asked: X in the first half, S
in the second, where --backtrack lets the target walk while sCM keeps the teacher.
Lost in 2D: fine detail of video. The published 100 to 1 is no ratio to copy: there sCM's gradient
is normalised over a whole sample, while VSD's sums over two million elements; here it is 1 to 1.
Differs from the code: student and fake are updated alike, not the student once in five.
"""

import torch

from toy2d.gallery.core import BATCH, Result, Toy, dsm, loop, update, vsd
from toy2d.gallery.samplers import one, two
from toy2d.gallery.sprint import noised, scm

NAME, QUERIES, START, STEPS, BACKTRACK = "rCM", "X + S", "copy", 1, True


def train(toy: Toy, mu: float = 1.0, consistency: float = 1.0, steps: int = 1000) -> Result:
    net = toy.copy()
    target, fake, walk = toy.nets(lambda n: (one(net)(torch.randn(n, 2)), None))
    adam, adam_fake = toy.adam(net, 1e-3, 0.9, 0.99), toy.adam(fake, 2e-3)
    for i in loop(toy.steps(steps, 15), adam, adam_fake):
        loss = consistency * scm(net, *noised(toy), r=min(1, i / 200))
        with torch.random.fork_rng():  # its own random numbers: mu = 0 is sCM to the bit
            torch.manual_seed(toy.seed * 10**6 + i)
            x0 = one(net)(torch.randn(BATCH, 2))
            pulled, mismatch = vsd(x0, toy.sigma(), fake, target, "dmd")
            update(adam, loss + mu * pulled)
            update(adam_fake, dsm(fake, x0.detach(), toy.sigma()))
        walk.step(mismatch)
    return Result(lambda z, _: one(net)(z), others={"in two steps": two(net)})
