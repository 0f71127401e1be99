"""Compile a problem's blocks ahead, many at a time: each in a process of its own, into the cache of
the compiler, where the stage then finds them.

A U-Net has 15 to 24 kinds of blocks. Each takes the compiler 10 to 20 seconds, most of them on one
core, and a stage that meets them one after the other waits for minutes. No bit depends on this.
"""

import copy
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import disback

COMPILED: set[tuple] = set()  # kinds of calls, with the samples
PROBE = 2  # samples of the calls that show what the blocks are asked


def prepare(problem: disback.Problem, args: Any) -> None:
    """What a stage calls before it compiles its networks: on a GPU the first rank fills the cache
    for the parts of the batch that the passes take."""
    if args.compile and not args.shard and disback.rank() == 0 and disback.device().type == "cuda":
        parts = disback.world_size() * args.accumulate
        compile_blocks(problem, problem.config.batch // parts)
    disback.barrier()


def compile_blocks(problem: disback.Problem, samples: int) -> int:
    """Compile all calls of blocks that both stages make in passes of so many samples, but for those
    that this process has had compiled. Returns how many; what fails the stage compiles itself."""
    found = {(key, samples): call for key, call in calls(problem).items()}
    tasks = [(on_meta(block), *rest, samples) for name, (block, *rest) in found.items()
             if name not in COMPILED]
    COMPILED.update(found)
    # A process for each core but one. Those with gradients take longest, so they begin.
    processes = max(1, min(len(tasks), (os.cpu_count() or 2) - 1))
    settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), set_up,
                                 settings) as pool:
            work = pool.map(compile_one, sorted(tasks, key=lambda task: not task[1]))
            list(tqdm(work, "compiling", len(tasks), disable=not tasks))
    except (RuntimeError, OSError) as error:
        print(f"note: compiling ahead failed ({str(error)[:200]})", file=sys.stderr)
    return len(tasks)


def calls(problem: disback.Problem) -> dict[tuple, tuple]:
    """For each kind of call of a block: (block, gradients or not, bf16 or not, device, arguments).
    Both networks are called as the stages call them, on a few samples, with random numbers that
    leave the stage's own as they were."""
    found: dict[tuple, tuple] = {}

    def note(block: nn.Module, args: tuple, kwargs: dict) -> None:
        call = pytree.tree_map_only(Tensor, Meta, (args, kwargs))
        autocast = torch.is_autocast_enabled(device.type)
        settings = [(name, value) for module in block.modules()
                    for name, value in vars(module).items() if isinstance(value, (int, str))]
        key = (type(block), str(block), str([p.shape for p in block.parameters()]), str(settings),
               torch.is_grad_enabled(), autocast, str(call))
        found.setdefault(key, (block, torch.is_grad_enabled(), autocast, device, call))

    blocks = [block for net in (problem.teacher, problem.student) for block in net.modules()
              if isinstance(block, problem.blocks)]
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    device = next(problem.teacher.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        (z, cond), sigma = problem.sample_inputs(PROBE), problem.sample_sigma(PROBE)
        with torch.no_grad():
            x0 = problem.generate(problem.student, z, cond)
            problem.teacher(x0, sigma, cond)
            problem.guide(problem.teacher, x0, sigma, cond)
        problem.generate(problem.student, z, cond)
        problem.teacher(x0, sigma, cond)
    for hook in hooks:
        hook.remove()
    return found


class Meta:
    """What the compiler looks at of a tensor: all but its numbers."""

    def __init__(self, tensor: Tensor):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.requires_grad = tensor.requires_grad
        self.channels_last = tensor.dim() == 4 and not tensor.is_contiguous() and (
            tensor.is_contiguous(memory_format=torch.channels_last))

    def __repr__(self) -> str:
        return str(vars(self))

    def tensor(self, samples: int) -> Tensor:
        n, *rest = self.shape
        made = torch.zeros(n * samples // PROBE, *rest, dtype=self.dtype, device=self.device)
        if self.channels_last:
            made = made.contiguous(memory_format=torch.channels_last)
        return made.requires_grad_(self.requires_grad)


def on_meta(block: nn.Module) -> nn.Module:
    """A copy of the block whose weights have shapes and no numbers: it goes to another process."""
    memo = {id(tensor): torch.empty_like(tensor, device="meta").requires_grad_(
        tensor.requires_grad) for tensor in (*block.parameters(), *block.buffers())}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(memo[id(parameter)], parameter.requires_grad)
    return copy.deepcopy(block, memo)


def set_up(precision: str, tf32: bool) -> None:
    """In each process: the settings that the cache depends on, and no processes of its own."""
    if precision != torch.get_float32_matmul_precision():  # what is set is not what is by default
        torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    # The key in the cache has torch's constants by the first module that knows them: not by this,
    # which is the stage's script, and in the stage itself has another name.
    sys.modules.pop("__mp_main__", None)


def compile_one(task: tuple) -> None:
    """In a process: call the compiled block once, and go back where there are gradients."""
    block, grad, autocast, device, call, samples = task
    block.to_empty(device=device)
    for tensor in (*block.parameters(), *block.buffers()):
        nn.init.zeros_(tensor)
    args, kwargs = pytree.tree_map_only(Meta, lambda meta: meta.tensor(samples), call)
    block.compile(dynamic=False)
    with (torch.set_grad_enabled(grad),
          torch.autocast(device.type, torch.bfloat16, enabled=autocast)):
        answer = block(*args, **kwargs)
    if answer.requires_grad:  # not before LoRA's first adapter
        answer.backward(torch.ones_like(answer))
