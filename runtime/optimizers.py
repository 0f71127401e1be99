"""The optimizer of both stages, and how its learning rate falls."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from runtime import ranks


def adamw(net: nn.Module, config: Any, lr: float, clip: float) -> torch.optim.AdamW:
    """AdamW, whose gradients are averaged over the ranks and cut to the norm `clip` at a step."""
    adam = torch.optim.AdamW(net.parameters(), lr=lr, betas=(config.beta1, config.beta2),
                             weight_decay=config.weight_decay, fused=True)

    def before(*_: Any) -> None:
        ranks.average_gradients(adam)
        if clip < math.inf:
            nn.utils.clip_grad_norm_(net.parameters(), clip)

    adam.register_step_pre_hook(before)
    return adam


def decaying(adam: torch.optim.Optimizer, config: Any, updates: int = 1) -> LambdaLR:
    """The schedule of stage 2's learning rate, with so many updates an iteration."""
    cosine, steps = config.decay == "cosine", config.backtrack_steps
    return LambdaLR(adam, lambda update: (
        1 + math.cos(math.pi * (update // updates) / steps)) / 2 if cosine else 1.0)
