"""What an iteration of backtrack.py takes: forwards and backwards, counted, and their FLOPs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def iterate(nets: Any) -> None:
    """An iteration, as in backtrack.py."""
    samples, mismatch = nets.update_student()
    for i in range(nets.config.fake_updates):
        nets.update_fake(samples if i == 0 else nets.fresh_samples())
    nets.scheduler.step(mismatch)


def evaluations(bench: Any, argv: Sequence[str]) -> tuple[float, int, float]:
    """F of an iteration of the stage for each sample of its batch, counted by hooks on all its
    networks; the least that the method needs, 4k + 4 for k updates of the fake and one more where
    the target is guided; and the FLOPs of an F, a multiply-add counting 2."""
    spent, nets = [], bench.networks(argv)

    def count(net, args, x0):
        spent.append(len(x0))
        if x0.requires_grad:
            x0.register_hook(lambda gradient: spent.append(2 * len(gradient)))

    hooks = [net.register_forward_hook(count) for net in (nets.student, nets.fake, nets.target)]
    iterate(nets)
    for hook in hooks:
        hook.remove()
    made, n, k = nets.problem, nets.config.batch, nets.config.fake_updates
    (z, cond), sigma = made.sample_inputs(n), made.sample_sigma(n)
    # The counter knows attention's kernels on CUDA only, but the plain products everywhere.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made.teacher(z, sigma, cond)
    return sum(spent) / n, 4 * k + 3 + made.guide_evals, counter.get_total_flops() / n
