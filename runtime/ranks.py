"""torchrun's ranks: each computes its part of one global batch, and gradients are averaged."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disback import Refusal
from runtime.errors import blame
from runtime.place import is_sharded


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """This rank's GPU, by its number, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def join_ranks() -> None:
    """Join torchrun's ranks, each with a GPU of its own where there are any."""
    with blame("no ranks to join: start them by torchrun, or unset RANK and LOCAL_RANK"):
        here, gpu = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.is_available()
        if gpu:
            if here >= torch.cuda.device_count():
                raise Refusal(f"there are {torch.cuda.device_count()} GPUs: start no more ranks")
            torch.cuda.set_device(here)
            torch.set_float32_matmul_precision("high")  # TF32
        if os.environ.get("RANK") and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo",
                                    timeout=timedelta(hours=1))  # the first may train a teacher


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The other ranks wait: what the first one trains or fetches, they find in the cache."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def share(n: int, parts: int, *drawn: Any) -> list[list]:
    """This rank's `parts` equal shares of what was drawn for a batch of n. Every rank draws the
    whole batch, from the same random numbers: what is learnt does not depend on how many share."""
    count = world_size() * parts
    return split(n, count, *drawn)[rank() * parts:(rank() + 1) * parts]


def split(n: int, count: int, *drawn: Any) -> list[list]:
    """`count` equal parts of tensors [n, ...] and dicts of them; anything else is in each whole."""
    size = n // count
    return [[cut(value, n, slice(i, i + size)) for value in drawn]
            for i in range(0, count * size, size)]


def cut(value: Any, n: int, part: slice) -> Any:
    if isinstance(value, dict):
        return {name: cut(inner, n, part) for name, inner in value.items()}
    return value[part] if isinstance(value, Tensor) and value.shape[:1] == (n,) else value


def mean_over_ranks(numbers: Tensor) -> Tensor:
    if not dist.is_initialized():
        return numbers
    dist.all_reduce(numbers)
    return numbers / world_size()


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """The mean over the ranks, once an update. FSDP2 averages those of shards by itself."""
    if world_size() == 1:
        return
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]
             if p.grad is not None and not is_sharded(p.grad)]
    if not grads:
        return
    torch._foreach_div_(grads, world_size())
    for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
        work.wait()


def random_state() -> list[torch.Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state()] if torch.cuda.is_available() else state


def set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0].clone())
    if torch.cuda.is_available() and len(state) > 1:  # a CPU's run has none
        torch.cuda.set_rng_state(state[1].clone())
