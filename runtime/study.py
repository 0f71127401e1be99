"""What studies share: a line a run, written as it ends, and the statistics of such lines."""

import contextlib
import fcntl
import io
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from disback import Refusal


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
        except OSError as error:
            raise Refusal(f"{file} is being written by another study: wait") from error
        whole = handle.seek(0, 2) == 0 or handle.seek(-1, 2) >= 0 and handle.read(1) == b"\n"

        def append(line: dict) -> None:
            handle.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            os.fsync(handle.fileno())

        if not whole:
            handle.write(b"\n")  # a line that was cut off must not swallow the next
        yield append


def follow_parent() -> None:
    """A worker whose parent was killed would wait for work for ever; an interrupt is the parent's
    to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
