"""Low-rank adapters: few weights, added to a frozen network's."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import disback


class LoRA(nn.Module):
    """W x + b + B A x with a frozen W and b; B = 0 at the start."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.A.T @ self.B.T


def lora(net: nn.Module, rank: int) -> nn.Module:
    """A frozen copy of a denoiser, with trained adapters of that rank on every layer of its net."""
    net = copy.deepcopy(net).requires_grad_(False)
    for i, layer in enumerate(net.net):
        if isinstance(layer, nn.Linear):
            net.net[i] = LoRA(layer, rank)
    return net


def adapters(net: nn.Module) -> dict[str, Tensor]:
    """What a node of a path holds of such a network."""
    return {name: weight for name, weight in net.named_parameters() if weight.requires_grad}


def load_adapters(file: Path, net: nn.Module) -> None:
    disback.load_strictly(net, net.state_dict() | load_file(file))
