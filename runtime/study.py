"""What studies share: their command line, the lines of their runs, and statistics of such lines.

A job is a seed of an arm in a cell at several learning rates. It leaves one JSON line, from which
alone the figures are drawn; a study that was stopped goes on.
"""

import contextlib
import fcntl
import functools
import io
import itertools
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from disback import Refusal
from runtime import command, files, folder, workers
from runtime.errors import must

Rates = tuple[float, float]  # of student and fake
Run = tuple[str, str, int, Rates]  # cell, arm, seed
Job = tuple[str, str, int, tuple[Rates, ...]]
Lines = dict[Run, dict]


@dataclass(frozen=True)
class Study:
    """What a problem's study is made of. `cells` and `arms` hold flags. A plan is a list of (cells,
    arms, rates, seeds), in the order in which they are run."""

    doc: str
    folder: Path
    cells: dict[str, dict]
    arms: dict[str, dict]
    plan: list[tuple]
    quick: list[tuple]  # a small plan
    measured: tuple[str, ...]  # what a line tells of each of its runs
    advance: Callable  # (cell, arm, seed, rates) -> what a line tells, in lists that go with rates
    draw: Callable  # (folder, lines): the figures
    alone: tuple[str, ...] = ()  # arms whose rates are jobs of their own
    prepare: Callable | None = None  # makes what all jobs need, and takes minutes

    def settings(self, cell: str, arm: str) -> int:
        """A number that changes with the flags."""
        return zlib.crc32(repr((self.cells[cell], self.arms[arm])).encode())

    def main(self, argv: Sequence[str]) -> None:
        problem = self.folder.parent.name
        parser = command.parser(f"python -m {problem}.study", self.doc)
        parser.add_argument("--quick", action="store_true",
                            help=f"a small plan, in runs/study/{problem}")
        parser.add_argument("--jobs", type=command.count, default=os.cpu_count(),
                            help="processes (all cores)")
        parser.add_argument("--figures-only", action="store_true",
                            help="draw the lines that are there")
        args = parser.parse_args(argv)
        quick = Path("runs/study", problem)
        file = (quick if args.quick else self.folder) / "lines.jsonl"
        files.must_take_files(file.parent, "folder: copy the repository to one that takes files")
        if args.figures_only and not file.exists():
            raise Refusal(f"{file} does not exist: run the study first")
        if not args.figures_only:
            self.run(self.quick if args.quick else self.plan, file, args.jobs)
        if not (lines := self.read(file)):
            raise Refusal(f"{file} has no runs yet: run the study first")
        self.draw(file.parent, lines)

    def run(self, plan: list[tuple], file: Path, processes: int) -> None:
        """Run what the lines in a file lack of a plan."""
        with appending(file) as append:
            todo = list(self.jobs(plan, self.read(file)))
            if todo and self.prepare:
                self.prepare()
            workers.work(functools.partial(execute, self), todo, processes, append)

    def jobs(self, plan: list[tuple], lines: Lines) -> Iterator[Job]:
        """What the lines lack; each run once."""
        seen = set(lines)
        for cells, arms, rates, seeds in plan:
            for cell, seed, arm in itertools.product(cells, seeds, arms):
                left = [pair for pair in rates if (cell, arm, seed, pair) not in seen]
                seen |= {(cell, arm, seed, pair) for pair in left}
                groups = [[pair] for pair in left] if arm in self.alone else [left]
                yield from ((cell, arm, seed, tuple(group)) for group in groups if group)

    def read(self, file: Path) -> Lines:
        """Every run of a file. A line that is corrupt, of other settings or of a run that was there
        before is refused, and its number named."""
        lines, texts = {}, file.read_bytes().splitlines(True) if file.exists() else []
        for number, text in enumerate(texts, 1):
            with files.blame(f"{file}, line {number}, is of no use: remove it to repeat its runs"):
                line = json.loads(text)
                must(text.endswith(b"\n"), "it was cut off")
                found = runs_of(line)
                for name in self.measured:
                    must(all(name in run or name in run["final"] for run in found.values()),
                         f"it lacks {name}")
                settings = self.settings(line["cell"], line["arm"])
                must(line["settings"] == settings, "of other settings")
                must(not found.keys() & lines.keys(), "it repeats a run")
            lines |= found
        return lines


def execute(study: Study, job: Job) -> dict:
    """A job's line."""
    began, (cell, arm, seed, rates) = time.perf_counter(), job
    try:
        found = study.advance(*job)
    finally:
        folder.leave()  # its stages hold their folders until a process ends
    return {"cell": cell, "arm": arm, "seed": seed, "rates": rates,
            "settings": study.settings(cell, arm),
            "seconds": round(time.perf_counter() - began, 1), **rounded(found)}


def rounded(value: object) -> object:
    """Four digits are kept; null stands for what is not finite."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def is_numeric(value: object, kinds: tuple = (int, float, type(None))) -> bool:
    """Whether a value, or all that a list holds, is a number, or null."""
    return (all(is_numeric(item, kinds) for item in value) if isinstance(value, list)
            else type(value) in kinds)


def runs_of(line: dict) -> Lines:
    """The runs of a job's line: each has its own of every list, and of those in "final"."""
    lists = {name: value for name, value in line.items() if isinstance(value, list)}
    must(is_numeric([*lists.values(), *line["final"].values()]) and is_numeric(
        [line["rates"], line["steps"], line["stage1"], line["seed"]], (int, float)), "no number")
    return {(line["cell"], line["arm"], line["seed"], tuple(pair)):
            {"steps": line["steps"], "stage1": line["stage1"],
             "final": {name: ends[i] for name, ends in line["final"].items()},
             **{name: value[i] for name, value in lists.items()}}
            for i, pair in enumerate(line["rates"])}


def rates_of(lines: Lines, cell: str, arm: str) -> list[Rates]:
    return sorted({key[3] for key in lines if key[0] == cell and key[1] == arm})


def of(lines: Lines, cell: str, arm: str, rates: Rates) -> dict[int, dict]:
    """The runs by seed."""
    found = {key[2]: run for key, run in lines.items()
             if key[0] == cell and key[1] == arm and key[3] == rates}
    return dict(sorted(found.items()))


def pooled(lines: Lines, cell: str, arm: str, rates: list[Rates]) -> list[dict]:
    """The runs at all these rates together."""
    return [run for pair in rates for run in of(lines, cell, arm, pair).values()]


def wilson(count: int, n: int) -> tuple[float, float, float]:
    """The share of n runs, and Wilson's 95% interval."""
    interval = binomtest(count, n).proportion_ci(method="wilson")
    return count / n, float(interval.low), float(interval.high)


def words(flags: dict) -> list[str]:
    return [word for name in flags for word in (f"--{name.replace('_', '-')}", str(flags[name]))]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress of the stages."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def appending(file: Path) -> Iterator[Callable[[dict], None]]:
    """A function that adds a line, in one write that is on the disk when it returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+", buffering=0) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refusal(f"{file} is being written by another study: wait") from error
        except OSError:  # a file system without locks
            pass
        whole = handle.seek(0, 2) == 0 or (handle.seek(-1, 2) >= 0 and handle.read(1) == b"\n")

        def append(line: dict) -> None:
            handle.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            os.fsync(handle.fileno())

        if not whole:
            handle.write(b"\n")  # a line that was cut off must not swallow the next
        yield append


def median_interval(values: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """The median of values, inf allowed, and its 95% bootstrap interval, from fixed draws."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    medians = np.sort(np.median(values[picks], axis=1))
    low, high = medians[math.floor(0.025 * draws)], medians[math.ceil(0.975 * draws) - 1]
    return float(np.median(values)), float(low), float(high)


def first_reach(evals: Sequence[float], swd: Sequence[float], level: float) -> float:
    """The evaluations after which a curve first lies at or below `level`, log-linear between its
    points; inf if it never does. Before its first point nothing is known: it counts as that."""
    for i, value in enumerate(swd):
        if value <= level:
            if i == 0 or value == level:
                return evals[i]
            share = math.log(swd[i - 1] / level) / math.log(swd[i - 1] / value)
            return evals[i - 1] + share * (evals[i] - evals[i - 1])
    return math.inf


def paired_ratio(ours: float, theirs: float, budget: float) -> float:
    """Ours over theirs for one seed. Where only theirs is never reached, their whole budget stands
    for it (the ratio is at most that); where only ours is, inf; where neither is, a draw, 1."""
    if math.isinf(ours) and math.isinf(theirs):
        return 1.0
    return ours / min(theirs, budget)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float] | None:
    """The median ratio of costs by seed, in shares of a budget, and its interval; None without a
    pair."""
    pairs = [paired_ratio(ours[seed], theirs[seed], 1.0) for seed in sorted(ours.keys() & theirs)]
    return median_interval(pairs) if pairs else None
