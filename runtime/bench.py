"""What an iteration of backtrack.py costs, and where its time goes, for any problem.

The stage's own networks are updated, plain VSD on random weights, whose arithmetic is that of
trained ones: nothing is downloaded, trained, evaluated or saved. Then their forwards and backwards
are timed alone. F is one forward of the score network on one sample; a backward counts 2. No other
work should run on the machine meanwhile.
"""

import argparse
import copy
import dataclasses
import gc
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from runtime import cli, command, place, results
from runtime.count import evaluations, iterate
from runtime.interface import Problem

# TFLOP/s in dense bf16, by the data sheets. The product of two large random matrices was seen to
# attain four fifths of it, 790 on an H200.
PEAK = {"NVIDIA H100 80GB HBM3": 990, "NVIDIA H200": 990, "NVIDIA A100-SXM4-40GB": 312,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312}
ROUNDS = 3  # that are timed, after one that is not; the fastest counts
SOON = ("batch", "F an iteration", "an iteration, ms", "TFLOP/s",
        "peak memory, GB", "the first iterations take longer by, s")


def now() -> float:
    """Seconds, once the device has done all that it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Bench:
    """A problem's name, its maker with a teacher of random weights, and the stage to look at."""

    name: str
    make: Callable  # as a problem's own
    stage: Any  # backtrack.py

    def problem(self, argv: Sequence[str]) -> tuple[Any, Problem]:
        """The stage's arguments, and the problem. Small learning rates keep random networks finite,
        however many the iterations."""
        args, _ = cli.parse("backtrack", "", [self.name, *argv, "--target", "teacher",
                                              "--lr-student", "1e-9", "--lr-fake", "1e-9"],
                            self.stage.FLAGS)
        args.fake_init = "teacher"
        return args, cli.make(args, self.make)

    def networks(self, argv: Sequence[str]) -> Any:
        return self.stage.Networks(*self.problem(argv), None)


def rounds(nets: Any, every: int, count: int, began: float) -> list[float]:
    """Seconds of each of 1 + `count` times `every` iterations; the first time holds all since
    `began`."""
    marks = [began]
    for _ in range(1 + count):
        for _ in range(every):
            iterate(nets)
        marks.append(now())
        if torch.cuda.is_available() and len(marks) == 2:
            torch.cuda.reset_peak_memory_stats()  # what it took to get here does not count
    return [after - before for before, after in zip(marks, marks[1:])]


def alone(made: Problem, shares: int, compiled: bool, repeats: int) -> dict[str, float]:
    """Milliseconds of an iteration's parts, each by itself, as often as an iteration has it where
    the batch is computed in `shares`."""
    n, k, without = made.config.batch // shares, made.config.fake_updates, torch.no_grad()
    target, student, fake = made.teacher, made.student, copy.deepcopy(made.teacher)
    for net in (target, student, fake):
        place.ready(net, argparse.Namespace(shard=False, compile=compiled), made.blocks)
    (z, cond), sigma = made.sample_inputs(n), made.sample_sigma(n)
    x = z * (1 + sigma**2).sqrt()
    adam = torch.optim.AdamW(fake.parameters(), lr=1e-9, fused=True)

    def backward(net, x0):
        net.zero_grad()
        x0.mean().backward()

    def optimize():
        if made.clip < math.inf:
            torch.nn.utils.clip_grad_norm_(fake.parameters(), made.clip)
        adam.step()

    works = {
        "student: forward and backward":
            (lambda: backward(student, made.generate(student, z, cond)), shares),
        "fake: forward": (without(lambda: fake(x, sigma, cond)), shares),
        "target: forward, guided if so":
            (without(lambda: made.guide(target, x, sigma, cond)), shares),
        "fake: forwards and backwards": (lambda: backward(fake, fake(x, sigma, cond)), k * shares),
        "fresh samples: forwards":
            (without(lambda: made.generate(student, z, cond)), (k - 1) * shares),
        "optimizers: clipping, AdamW": (optimize, 1 + k)}
    return {name: milliseconds(work, repeats) * times if times else 0.0
            for name, (work, times) in works.items()}


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """The least of the means over `repeats` calls."""
    means = []
    for _ in range(1 + ROUNDS):
        began = now()
        for _ in range(repeats):
            work()
        means.append((now() - began) / repeats * 1e3)
    return min(means[1:])


def column(bench: Bench, argv: Sequence[str], evals: float, flops: float,
           every: int) -> dict[str, str]:
    """The numbers of a batch size, from runs of `every` iterations."""
    free()
    began = now()
    nets = bench.networks(argv)
    first, *others = (t / every * 1e3 for t in rounds(nets, every, ROUNDS, began))
    iteration = min(others)
    memory = results.peak_memory()
    del nets
    free()
    args, made = bench.problem(argv)
    parts, batch = alone(made, args.accumulate, args.compile, every), made.config.batch
    networks = sum(parts.values()) - parts["optimizers: clipping, AdamW"]
    rate = batch * evals * flops / iteration / 1e9
    peak = PEAK.get(device()) if getattr(made.config, "precision", "") == "bf16" else None
    times = parts | {"the rest": iteration - sum(parts.values()),
                     "all forwards and backwards": networks, "an iteration": iteration}
    return {"batch": str(batch), "F an iteration": f"{evals:g}",
            **{f"{name}, ms": f"{ms:,.3f}" for name, ms in times.items()},
            "  / all forwards and backwards": f"{iteration / networks:.2f}",
            "  / (F x the fake's forward)": f"{iteration / evals / parts['fake: forward']:.2f}",
            "the first iterations take longer by, s": f"{(first - iteration) * every / 1e3:.1f}",
            "images a second": f"{batch / iteration * 1e3:,.4g}", "TFLOP/s": f"{rate:.3g}",
            "  / the peak": f"{rate / peak:.1%}" if peak else "-",
            "peak memory, GB": f"{memory / 1e9:.2f}"}


def free() -> None:
    """Give back what was left on the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def device() -> str:
    threads = torch.get_num_threads()
    return (torch.cuda.get_device_name() if torch.cuda.is_available()
            else f"CPU, {threads} thread{'s' * (threads > 1)}")


def report(bench: Bench, argv: Sequence[str], settings: list, compiled: bool, every: int) -> None:
    """Print the table: a row for each number, a column for each of `settings`, the flags of a batch
    size and of the fake's updates. Before that, as soon as it is known, the time of an iteration:
    a run that is cut off has then been of use as well."""
    # F is counted on a single sample, as what is timed may fill the memory.
    split = any(word.split("=")[0] == "--accumulate" for word in argv)
    one = settings[0][0] if split else ["--batch", "1"]
    counted, columns, last = {}, [], None
    for batch, updates in settings:
        if tuple(updates) not in counted:
            plain = [*argv, *one, *updates, "--no-compile"]
            evals, least, flops = evaluations(bench, plain)
            if not counted:  # the problem has set the number of threads
                print(bench.name, *argv, "on", device(), "with torch", torch.__version__,
                      "compiled" if compiled else "not compiled", flush=True)
            counted[tuple(updates)] = evals
            print(f"{evals:g} F an iteration, {least} is the least; F is {flops / 1e9:.4g} GFLOP",
                  flush=True)
        if compiled and batch != last:  # what was compiled for another size is of no use
            torch.compiler.reset()
        flags, last = [*argv, *batch, *updates, "--compile" if compiled else "--no-compile"], batch
        try:
            columns.append(column(bench, flags, counted[tuple(updates)], flops, every))
        except torch.OutOfMemoryError:
            columns.append(defaultdict(lambda: "-", {"batch": "".join(batch[1:]),
                                                     "peak memory, GB": "too large"}))
        print(", ".join(f"{row.strip()} {columns[-1].get(row, '-')}" for row in SOON),
              file=sys.stderr, flush=True)
    for row in max(columns, key=len):
        print(f"{row:40}" + "".join(f"{column[row]:>12}" for column in columns))
    if any(float(column.get("the rest, ms", "0").replace(",", "")) < 0 for column in columns):
        print("the rest is below 0 where parts took longer alone than together, which is noise",
              file=sys.stderr)


def profile(bench: Bench, argv: Sequence[str], most: int = 15) -> None:
    """Print where the device's time goes in an iteration: its longest kernels, or operators where
    there is no GPU."""
    gpu, nets = torch.cuda.is_available(), bench.networks(argv)
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    iterate(nets)  # the first compiles
    now()
    with torch.profiler.profile(activities=[kind]) as profiler:
        iterate(nets)
        now()
    name = "self_device_time_total" if gpu else "self_cpu_time_total"
    found = sorted(profiler.key_averages(), key=lambda row: -getattr(row, name))
    total = sum(getattr(row, name) for row in found)
    print(f"{total / 1e3:.1f} ms in {sum(row.count for row in found)} calls, of which")
    for row in found[:most]:
        spent = getattr(row, name)
        print(f"{spent / total:6.1%}{spent / 1e3:10.2f} ms{row.count:7} x  {row.key[:100]}")


def main(bench: Bench, every: int, argv: Sequence[str]) -> None:
    """Print the table of a problem, or a profile."""
    parser = argparse.ArgumentParser(f"python -m {bench.name}.bench", allow_abbrev=False, epilog=(
        f"All other flags are those of backtrack.py {bench.name}."))
    parser.error = command.refuse
    parser.add_argument("--batch", type=command.count, nargs="+",
                        help="a column each; default: preset's")
    parser.add_argument("--fake-updates", type=command.count, nargs="+", help="columns as well")
    parser.add_argument("--iterations", type=command.count, default=every,
                        help="of which the mean is taken, three times (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="on by default "
                        "on CUDA", default=torch.cuda.is_available())
    parser.add_argument("--profile", action="store_true",
                        help="the longest kernels of an iteration, instead of the table")
    args, others = parser.parse_known_args(argv)
    batches = [["--batch", str(n)] for n in args.batch or []] or [[]]
    updates = [["--fake-updates", str(k)] for k in args.fake_updates or []] or [[]]
    settings = [(batch, more) for batch in batches for more in updates]
    if args.profile:
        profile(bench, [*others, *batches[0], *updates[0],
                        "--compile" if args.compile else "--no-compile"])
    else:
        report(bench, others, settings, args.compile, args.iterations)
