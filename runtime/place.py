"""Networks put in place: sharded over the ranks, compiled, and their weights back in one piece."""

from typing import Any

import torch
from torch import Tensor, nn


def ready(net: nn.Module, args: Any, blocks: tuple[type, ...], compiled: bool = True) -> None:
    """Shard (FSDP2) and compile `net` in place, as asked; its weights keep their names."""
    units = [m for m in net.modules() if isinstance(m, blocks)]
    if args.shard:
        from torch.distributed.fsdp import fully_shard  # takes seconds, and --help has none

        net.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
        for block in units:
            fully_shard(block)
        # By default the root stays whole after an answer, and would answer so after a switch.
        fully_shard(net, reshard_after_forward=True)
        net.register_load_state_dict_pre_hook(in_shards)
    elif not units:
        units = [net]
    if args.compile and compiled:
        torch._dynamo.config.recompile_limit = 256  # all layers share it, and all of a kind a graph
        for unit in units:
            unit.compile(dynamic=False)  # each network has one size of batch, its own


def in_shards(net: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    """Before weights are loaded: those that are whole become this rank's shards of them. A name
    that the state dict of `net` has not is of what is frozen, in shards already, or a wrong one."""
    own = net.state_dict()
    for name, tensor in state.items():
        if (like := own.get(name.removeprefix(prefix))) is not None:
            state[name] = sharded_like(tensor, like)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole `tensor`, in shards and on the device of `like` where that is in shards."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of what is in shards, on the CPU; anything else as it is."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor
