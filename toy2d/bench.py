"""What an iteration of backtrack.py costs, and where its time goes: python -m toy2d.bench

The stage itself runs, plain VSD on networks of random weights, whose arithmetic is that of trained
ones: nothing is downloaded, trained, evaluated or saved. Then its networks' forwards and backwards
are timed alone. F is one forward of the score network on one sample; a backward counts 2. No other
work should run on the machine meanwhile. imagenet64.bench and sdxl.bench are the same on theirs.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import backtrack
import disback
from toy2d import model, problem

# TFLOP/s in dense bf16, by the data sheets. The product of two large random matrices was seen to
# attain four fifths of it, 790 on an H200.
PEAK = {"NVIDIA H100 80GB HBM3": 990, "NVIDIA H200": 990, "NVIDIA A100-SXM4-40GB": 312,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312}
ROUNDS = 3  # that are timed, after one that is not; the fastest counts
SOON = ("batch", "F an iteration", "an iteration, ms", "TFLOP/s",
        "peak memory, GB", "the first iterations take longer by, s")
RANDOM = [mock.patch.object(problem, "trained_teacher", lambda config, data: (
    model.Denoiser(config.width, config.depth, config.sigma_data), "random"))]


class Enough(Exception):
    """Ends the stage from within, before it saves anything."""


def now() -> float:
    """Seconds, once the device has done all that it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make(argv: Sequence[str]) -> tuple[Any, disback.Problem]:
    return disback.start("backtrack", "", argv, **backtrack.FLAGS)


def stage(argv: Sequence[str], every: int, rounds: int, mark: Callable[[], float],
          prepare: Callable = lambda made: None) -> list[float]:
    """Run backtrack.py's loop, and return by how much mark() grew in each of 1 + `rounds` times
    `every` iterations, the first from when the problem was made: it compiles. It is called in place
    of the evaluation, which is once a line of the log. prepare(problem) comes before anything."""
    module, marks = importlib.import_module(f"{argv[0]}.problem"), []
    original = module.make

    def evaluate(student):
        if torch.cuda.is_available() and len(marks) == 1:
            torch.cuda.reset_peak_memory_stats()  # what it took to get here does not count
        marks.append(mark())
        if len(marks) > 1 + rounds:
            raise Enough
        return {}

    def made(*args, **changes):
        real = original(*args, **changes)
        prepare(real)
        marks.append(mark())
        return dataclasses.replace(
            real, evaluate=evaluate, snapshot=lambda: real.sample_inputs(1))

    with (tempfile.TemporaryDirectory() as out, mock.patch.object(module, "make", made),
          contextlib.suppress(Enough)):
        # Small learning rates keep random networks finite, however many the iterations.
        backtrack.main([*argv, "--target", "teacher", "--out", out, "--log-every", str(every),
                        "--steps", str(every * (1 + rounds)), "--save-every", str(10**9),
                        "--lr-student", "1e-9", "--lr-fake", "1e-9"])
    return [after - before for before, after in zip(marks, marks[1:])]


def evaluations(argv: Sequence[str]) -> tuple[float, int, float]:
    """F of an iteration of the stage for each sample of its batch, counted by hooks on all its
    networks; the least that the method needs, 4k + 4 for k updates of the fake and one more where
    the target is guided; and the FLOPs of an F, a multiply-add counting 2."""
    spent = []

    def count(net, args, x0):
        spent.append(len(x0))
        if x0.requires_grad:
            x0.register_hook(lambda gradient: spent.append(2 * len(gradient)))

    def prepare(made):  # the fake is a copy, with the hook
        made.teacher.register_forward_hook(count)
        made.student.register_forward_hook(count)

    _, evals = stage(argv, 1, 1, lambda: sum(spent), prepare)
    _, made = make(argv)
    n, k = made.config.batch, made.config.fake_updates
    (z, cond), sigma = made.sample_inputs(n), made.sample_sigma(n)
    # The counter knows attention's kernels on CUDA only, but the plain products everywhere.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made.teacher(z, sigma, cond)
    return evals / n, 4 * k + 3 + made.guide_evals, counter.get_total_flops() / n


def alone(made: disback.Problem, shares: int, compiled: bool, repeats: int) -> dict[str, float]:
    """Milliseconds of an iteration's parts, each by itself, as often as an iteration has it where
    the batch is computed in `shares`."""
    n, k, without = made.config.batch // shares, made.config.fake_updates, torch.no_grad()
    target, student, fake = made.teacher, made.student, copy.deepcopy(made.teacher)
    for net in (target, student, fake):
        disback.ready(net, argparse.Namespace(shard=False, compile=compiled), made.blocks)
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


def column(argv: Sequence[str], evals: float, flops: float, every: int) -> dict[str, str]:
    """The numbers of a batch size, from runs of `every` iterations."""
    free()
    first, *rounds = (seconds / every * 1e3 for seconds in stage(argv, every, ROUNDS, now))
    iteration = min(rounds)
    memory = disback.peak_memory()
    free()
    args, made = make(argv)
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


def report(argv: Sequence[str], settings: list, compiled: bool, every: int) -> None:
    """Print the table: a row for each number, a column for each of `settings`, the flags of a batch
    size and of the fake's updates. Before that, as soon as it is known, the time of an iteration:
    a run that is cut off has then been of use as well."""
    print(*argv, "on", device(), "with torch", torch.__version__,
          "compiled" if compiled else "not compiled", flush=True)
    # F is counted on a single sample, as what is timed may fill the memory.
    one = settings[0][0] if "--accumulate" in argv else ["--batch", "1"]
    counted, columns, last = {}, [], None
    for batch, updates in settings:
        if tuple(updates) not in counted:
            evals, least, flops = evaluations([*argv, *one, *updates, "--no-compile"])
            counted[tuple(updates)] = evals
            print(f"{evals:g} F an iteration, {least} is the least; F is {flops / 1e9:.4g} GFLOP",
                  flush=True)
        if compiled and batch != last:  # what was compiled for another size is of no use
            torch.compiler.reset()
        flags, last = [*argv, *batch, *updates, "--compile" if compiled else "--no-compile"], batch
        try:
            columns.append(column(flags, counted[tuple(updates)], flops, every))
        except torch.OutOfMemoryError:
            columns.append(defaultdict(lambda: "-", {"batch": "".join(batch[1:]),
                                                     "peak memory, GB": "too large"}))
        print(", ".join(f"{row.strip()} {columns[-1].get(row, '-')}" for row in SOON),
              file=sys.stderr, flush=True)
    for row in max(columns, key=len):
        print(f"{row:40}" + "".join(f"{column[row]:>12}" for column in columns))


def profile(argv: Sequence[str], most: int = 15) -> None:
    """Print where the device's time goes in an iteration: its longest kernels, or operators where
    there is no GPU."""
    gpu, calls = torch.cuda.is_available(), []
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[kind])

    def mark() -> float:
        calls.append(now())
        if len(calls) == 3:  # the iteration after the first, which compiles
            profiler.start()
        if len(calls) == 4:
            profiler.stop()
        return now()

    stage(argv, 1, 3, mark)
    name = "self_device_time_total" if gpu else "self_cpu_time_total"
    found = sorted(profiler.key_averages(), key=lambda row: -getattr(row, name))
    total = sum(getattr(row, name) for row in found)
    print(f"{total / 1e3:.1f} ms in {sum(row.count for row in found)} calls, of which")
    for row in found[:most]:
        spent = getattr(row, name)
        print(f"{spent / total:6.1%}{spent / 1e3:10.2f} ms{row.count:7} x  {row.key[:100]}")


def main(name: str, random: list, every: int, argv: Sequence[str]) -> None:
    """Print the table of a problem; `random` patches it to have a teacher of random weights."""
    parser = argparse.ArgumentParser(f"python -m {name}.bench", allow_abbrev=False, epilog=(
        f"All other flags are those of backtrack.py {name}."))
    parser.error = disback.refuse
    parser.add_argument("--batch", type=int, nargs="+", help="a column each; default: preset's")
    parser.add_argument("--fake-updates", type=int, nargs="+", help="columns as well")
    parser.add_argument("--iterations", type=int, default=every,
                        help="of which the mean is taken, three times (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="on by default "
                        "on CUDA", default=torch.cuda.is_available())
    parser.add_argument("--profile", action="store_true",
                        help="the longest kernels of an iteration, instead of the table")
    args, others = parser.parse_known_args(argv)
    for flag, numbers in (("--iterations", [args.iterations]), ("--batch", args.batch or []),
                          ("--fake-updates", args.fake_updates or [])):
        if any(number < 1 for number in numbers):
            disback.refuse(f"{flag} must be at least 1, not {min(numbers)}")
    batches = [["--batch", str(n)] for n in args.batch or []] or [[]]
    updates = [["--fake-updates", str(k)] for k in args.fake_updates or []] or [[]]
    settings = [(batch, more) for batch in batches for more in updates]
    with contextlib.ExitStack() as patched:
        for patch in random:
            patched.enter_context(patch)
        if args.profile:
            profile([name, *others, *batches[0], *updates[0],
                     "--compile" if args.compile else "--no-compile"])
        else:
            report([name, *others], settings, args.compile, args.iterations)


if __name__ == "__main__":
    disback.run(functools.partial(main, "toy2d", RANDOM, 500))
