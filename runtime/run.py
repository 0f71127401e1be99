"""A stage under way: its folder, its steps, its log, and its checkpoints, from which it resumes."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from disback import Refusal, load_strictly
from runtime import files, place, ranks
from runtime.folder import LOG, claim, must_be_here, what_matters
from runtime.interface import Problem
from runtime.records import check_finite, cut_log, must_agree
from runtime.signals import asked_to_stop, heeding_signals


class Run:
    """A checkpoint holds `nets`, the `optimizers` of the networks of the same names, and `others`,
    which have a state_dict. `settings` are what a resumed run must share.

    A new run takes its folder here, a resumed one finds its state at the first of its steps."""

    def __init__(self, stage: str, args: Any, problem: Problem, nets: dict, optimizers: dict,
                 others: dict, **settings: Any):
        self.stage, self.args, self.config = stage, args, problem.config
        self.nets, self.optimizers, self.others = nets, optimizers, others
        self.settings = problem.about | what_matters(problem.config, stage) | settings
        folder = args.out / "path" if stage == "degrade" else args.out
        self.state, self.log_file = folder / "state.pt", folder / "log.jsonl"
        self.step, self.since, self.began = 0, 0, time.perf_counter()
        self.sums: dict[str, Any] = {}
        self.progress = None
        self.claim = lambda: claim(args, problem, stage, settings, self.room(problem))
        if not args.resume:
            self.claim()

    def room(self, problem: Problem) -> int:
        """Bytes that the folder must have: for node 0, 2N candidates and two checkpoints of stage
        1; or for two of stage 2, as one is written beside the other, or for one and the student.
        Adam has two numbers for each that it learns."""
        if self.step == getattr(self.config, f"{self.stage}_steps"):
            return LOG
        if self.stage == "degrade":
            whole = sum(weight.nbytes for weight in problem.teacher.state_dict().values())
            return LOG + (problem.disk or whole * (7 + 2 * self.config.nodes))
        count = sum(w.numel() for net in self.nets.values() for w in net.state_dict().values())
        learnt = sum(p.numel() for name in self.optimizers for p in self.nets[name].parameters()
                     if p.requires_grad)
        checkpoint = 4 * (count + 2 * learnt)
        return LOG + checkpoint + max(checkpoint, problem.exported)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left, from 1 on. After each a checkpoint is saved where one is due, or
        where a signal has asked to stop, which ends the program."""
        self.total = total
        if self.args.resume:
            self.restore()
            self.claim()  # config.json gets what may differ
        with heeding_signals() as signals:
            self.progress = tqdm(range(self.step + 1, total + 1), self.stage, total,
                                 initial=self.step, disable=ranks.rank() > 0)
            for step in self.progress:
                self.step = step
                yield step
                must_be_here()
                name = asked_to_stop(signals)
                if name or self.saves_at(step):
                    self.save()
                if name:
                    sys.exit(f"stopped by {name} after step {step}: --resume goes on from there"
                             if ranks.rank() == 0 else 1)

    def saves_at(self, step: int) -> bool:
        return step % self.config.save_every == 0 or step == self.total

    def logs_at(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total

    def count(self, **numbers: torch.Tensor) -> None:
        """Numbers of this step, whose means since the last line, and over the ranks, are logged; no
        wait for a GPU."""
        means = ranks.mean_over_ranks(torch.stack(list(numbers.values())))
        for name, number in zip(numbers, means):
            self.sums[name] = self.sums.get(name, 0) + number

    def log(self, node: Any, **numbers: float) -> dict[str, float]:
        """Add a line to the log, with the means of what was counted; Refusal where a number is not
        finite."""
        means = {name: total.item() / (self.step - self.since)
                 for name, total in self.sums.items()}
        self.sums, self.since, numbers = {}, self.step, means | numbers
        kept = f"; {self.state} is kept as it was" if self.state.exists() else ""
        check_finite(numbers, self.step, node, kept)
        line = json.dumps({"step": self.step, "node": node, **numbers}) + "\n"
        if ranks.rank() == 0:
            with files.blame(f"cannot write {self.log_file}"), open(self.log_file, "a") as handle:
                handle.write(line)
        if self.progress is not None:
            self.progress.set_postfix(node=node, **{k: f"{v:.3g}" for k, v in means.items()})
        return numbers

    def save(self) -> None:
        """Write all that a resumed run needs. What is not finite never replaces what was good."""
        from torch.distributed.checkpoint import state_dict as dcp  # takes seconds

        sharded = any(place.is_sharded(p) for net in self.nets.values() for p in net.parameters())
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=sharded)
        state = {"step": self.step, "since": self.since, "sums": self.sums,
                 "seconds": self.seconds, "settings": self.settings, "random": ranks.random_state(),
                 "others": {name: other.state_dict() for name, other in self.others.items()}}
        for name, net in self.nets.items():
            state[name] = dcp.get_model_state_dict(net, options=options)
            if not all(weight.isfinite().all() for weight in state[name].values()):
                raise Refusal(f"a weight of the {name} is not finite at step {self.step}: try "
                              f"lower learning rates; {self.state} is kept as it was")
        for name, adam in self.optimizers.items():
            state["adam_" + name] = dcp.get_optimizer_state_dict(self.nets[name], adam,
                                                                 options=options)
        files.atomically(self.state, lambda beside: torch.save(state, beside))
        ranks.barrier()  # no rank goes on, or ends, while the first is still writing

    def restore(self) -> None:
        """Go back to the last checkpoint, which any number of ranks can read; cut later lines and a
        torn one from the log, and remove what a kill left half written."""
        from torch.distributed.checkpoint import state_dict as dcp

        with files.blame(f"{self.state} is not a checkpoint of this run: name another --out"):
            state = torch.load(self.state, map_location="cpu", weights_only=True, mmap=True)
            must_agree(self.state, state["settings"], self.settings)
            for name, net in self.nets.items():
                load_strictly(net, state[name])
            for name, adam in self.optimizers.items():
                dcp.set_optimizer_state_dict(self.nets[name], adam, state["adam_" + name],
                                             options=dcp.StateDictOptions(full_state_dict=True))
            for name, other in self.others.items():
                other.load_state_dict(state["others"][name])
            self.step, self.since = state["step"], state["since"]
            device = next(next(iter(self.nets.values())).parameters()).device
            self.sums = {name: total.to(device) for name, total in state["sums"].items()}
            self.began = time.perf_counter() - state["seconds"]
            ranks.set_random_state(state["random"])
        if ranks.rank() == 0:
            cut_log(self.log_file, self.step)
