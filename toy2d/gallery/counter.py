"""What a run costs."""

import torch
from torch.nn.modules.module import register_module_forward_hook

from toy2d import model


class Count:
    """While it is open, `evals` grows by the rows of every answer of a Perceptron, three times
    where a backward is to follow or where a directional derivative is taken."""

    def __enter__(self) -> "Count":
        self.evals, self.handle = 0, register_module_forward_hook(self.add)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def add(self, module: torch.nn.Module, _: tuple, answer: torch.Tensor) -> None:
        if isinstance(module, model.Perceptron):
            tangent = torch.autograd.forward_ad.unpack_dual(answer).tangent
            self.evals += len(answer) * (3 if answer.requires_grad or tangent is not None else 1)
