"""What a run took, and how good its student is; samples that the ranks share among them."""

import sys
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disback import Refusal
from runtime import files, ranks
from runtime.folder import must_be_here
from runtime.interface import Config, Problem
from runtime.records import check_number


def evals_an_iteration(problem: Problem) -> int:
    """Of the score network, in forwards of one sample; a backward counts 2. An update of the
    student costs its own forward, the backward, fake and target. One of the fake costs 3: the first
    takes the student's samples, the others draw new ones."""
    k = problem.config.fake_updates
    return problem.config.batch * (4 + problem.guide_evals + 3 * k + (k - 1))


def evals_of_path(config: Config, candidates: int) -> int:
    """Of stage 1, in the same unit: a step costs 4, the student's forward and the degrading
    teacher's with its backward; a candidate costs 1, and the first samples 1."""
    return (1 + 4 * config.degrade_steps + candidates) * config.batch


def peak_memory() -> int:
    """In bytes: the accelerator's, or without one the process's."""
    resident = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.cuda.max_memory_allocated() or resident


def finish(out: Path, problem: Problem, student: nn.Module, path: Any, compare: Path | None,
           **about: Any) -> None:
    """Write the student and metrics.json, draw the figures, and say where they are and how good the
    student is. `about` is what else metrics.json tells."""
    files.save_tensors(out / "student.safetensors", student.state_dict())
    measured, steps = problem.evaluate(student), problem.config.backtrack_steps
    stage1 = path.about.get("network_evals", 0) if path else 0
    stage2, file = evals_an_iteration(problem) * steps, out / "metrics.json"
    # A finished run whose figures are drawn again keeps the peak of its training.
    before = files.load_json(file, "remove it").get("peak_memory_bytes", 0) if file.exists() else 0
    check_number(file, "peak_memory_bytes", before)
    ranks.barrier()
    must_be_here()
    files.save_json(file, {
        **problem.about, "steps": steps, **about, "peak_memory_bytes": max(before, peak_memory()),
        "network_evals": {"stage1": stage1, "stage2": stage2, "total": stage1 + stage2},
        **measured})
    ranks.barrier()
    try:
        with files.lost(f"the student is in {out}; --resume, not --overwrite, draws its figures"):
            problem.draw(out, path, compare)
    except Refusal as error:
        raise Refusal(f"{error}; the student is kept in {out}") from error
    if ranks.rank() == 0:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        drawn = f"; figures in {out}/figures" if (out / "figures").is_dir() else ""
        print(f"student after {steps} iterations: {numbers or 'not measured'} "
              f"({out}/metrics.json){drawn}")


class SplitOverRanks(nn.Module):
    """A network, or another function of samples, that every rank calls alike: each answers for its
    share of the n samples where n can be divided, and all get all n answers. A module, as some ask
    a network for its parameters."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        if ranks.world_size() == 1 or len(x) % ranks.world_size():
            return self.function(x, *rest)
        (mine,) = ranks.share(len(x), 1, x, *rest)
        answer = self.function(*mine).contiguous()
        answers = [torch.empty_like(answer) for _ in range(ranks.world_size())]
        dist.all_gather(answers, answer)
        return torch.cat(answers)
