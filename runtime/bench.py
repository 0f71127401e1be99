"""What an iteration of backtrack.py costs, and where its time goes, for any problem.

The stage's own networks are updated, plain VSD on random weights, whose arithmetic is that of
trained ones: nothing is downloaded, trained, evaluated or saved. Then their forwards and backwards
are timed alone. F is one forward of the score network on one sample; a backward counts 2. No other
work should run on the machine meanwhile.
"""

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from runtime import cli, command, results

# TFLOP/s in dense bf16, by the data sheets. The product of two large random matrices was seen to
# attain four fifths of it, 790 on an H200.
PEAK = {"NVIDIA H100 80GB HBM3": 990, "NVIDIA H200": 990, "NVIDIA A100-SXM4-40GB": 312,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312}
ROUNDS = 3  # that are timed; the fastest counts


@dataclasses.dataclass(frozen=True)
class Bench:
    """A problem's name, its maker with a teacher of random weights, and the stage to look at."""

    name: str
    make: Callable  # as a problem's own
    stage: Any  # backtrack.py

    def networks(self, argv: Sequence[str]) -> Any:
        """The stage's, of its arguments. Small learning rates keep random networks finite, however
        many the iterations."""
        args, _ = cli.parse("backtrack", "", [
            self.name, *argv, "--target", "teacher", "--fake-init", "teacher",
            "--lr-student", "1e-9", "--lr-fake", "1e-9"], self.stage.FLAGS)
        if args.resume or args.overwrite or args.compare:
            command.refuse("--resume, --overwrite and --compare are for a run, not for a benchmark")
        return self.stage.Networks(args, cli.make(args, self.make), None)


def iterate(nets: Any) -> None:
    """An iteration, as in backtrack.py."""
    samples, mismatch = nets.update_student()
    for i in range(nets.config.fake_updates):
        nets.update_fake(samples if i == 0 else nets.fresh_samples())
    nets.scheduler.step(mismatch)


def evaluations(nets: Any) -> tuple[float, int, float]:
    """F of an iteration of the stage for each sample of its batch, counted by hooks on all its
    networks; the least that the method needs, 4k + 4 for k updates of the fake and one more where
    the target is guided; and the FLOPs of an F, a multiply-add counting 2."""
    spent = []

    def count(net, args, x0):
        spent.append(len(x0))
        if x0.requires_grad:
            x0.register_hook(lambda gradient: spent.append(2 * len(gradient)))

    hooks = [net.register_forward_hook(count) for net in (nets.student, nets.fake, nets.target)]
    iterate(nets)
    for hook in hooks:
        hook.remove()
    made, n, k = nets.problem, nets.config.batch, nets.config.fake_updates
    (z, cond), sigma = made.sample_inputs(n), made.sample_sigma(n)
    # The counter knows attention's kernels on CUDA only, but the plain products everywhere.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made.teacher(z, sigma, cond)
    return sum(spent) / n, 4 * k + 3 + made.guide_evals, counter.get_total_flops() / n


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """The least of the means over `repeats` calls, each round after two calls more."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return min(timer.timeit(repeats).mean for _ in range(ROUNDS)) * 1e3


def alone(nets: Any, repeats: int) -> dict[str, float]:
    """Milliseconds of an iteration's parts, each by itself, as often as an iteration has it."""
    made, n, k = nets.problem, nets.config.batch, nets.config.fake_updates
    shares = nets.share(*made.sample_inputs(n), made.sample_sigma(n))
    (z, cond, sigma), count, without = shares[0], len(shares), torch.no_grad()
    x = z * (1 + sigma**2).sqrt()

    def backward(net, x0):
        net.zero_grad()
        x0.mean().backward()

    works = {
        "student: forward and backward":
            (lambda: backward(nets.student, made.generate(nets.student, z, cond)), count),
        "fake: forward": (without(lambda: nets.fake(x, sigma, cond)), count),
        "target: forward, guided if so": (without(lambda: nets.guided(x, sigma, cond)), count),
        "fake: forwards and backwards":
            (lambda: backward(nets.fake, nets.fake(x, sigma, cond)), k * count),
        "fresh samples: forwards":
            (without(lambda: made.generate(nets.student, z, cond)), (k - 1) * count),
        "optimizers: clipping, AdamW": (nets.adams["fake"].step, 1 + k)}
    return {name: milliseconds(work, repeats) * times if times else 0.0
            for name, (work, times) in works.items()}


def measure(nets: Any, evals: float, flops: float, repeats: int) -> dict[str, str]:
    """The rows of a table."""
    began = time.perf_counter()
    iterate(nets)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # what it took to get here does not count
    first = time.perf_counter() - began
    iteration = milliseconds(lambda: iterate(nets), repeats)
    memory, parts, batch = results.peak_memory(), alone(nets, repeats), nets.config.batch
    networks = sum(parts.values()) - parts["optimizers: clipping, AdamW"]
    rate = batch * evals * flops / iteration / 1e9
    peak = PEAK.get(device()) if nets.config.precision == "bf16" else None
    times = parts | {"the rest, where below 0 noise": iteration - sum(parts.values()),
                     "all forwards and backwards": networks, "an iteration": iteration}
    return {"the first iteration, s": f"{first:.1f}",
            **{f"{name}, ms": f"{ms:,.3f}" for name, ms in times.items()},
            "  / all forwards and backwards": f"{iteration / networks:.2f}",
            "  / (F x the fake's forward)": f"{iteration / evals / parts['fake: forward']:.2f}",
            "images a second": f"{batch / iteration * 1e3:,.4g}", "TFLOP/s": f"{rate:.3g}",
            "  / the peak": f"{rate / peak:.1%}" if peak else "-",
            "peak memory, GB": f"{memory / 1e9:.2f}"}


def device() -> str:
    threads = torch.get_num_threads()
    return (torch.cuda.get_device_name() if torch.cuda.is_available()
            else f"CPU, {threads} thread{'s' * (threads > 1)}")


def profile(nets: Any) -> str:
    """Where the device's time goes in an iteration: its longest kernels, or operators where there
    is no GPU."""
    gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    iterate(nets)  # the first compiles
    with torch.profiler.profile(activities=[kind]) as profiler:
        iterate(nets)
    return profiler.key_averages().table("self_device_time_total" if gpu else "self_cpu_time_total",
                                         row_limit=15, max_name_column_width=60)


def parse(bench: Bench, every: int, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own flags, and those of the stage."""
    parser = command.parser(f"python -m {bench.name}.bench", "",
                            epilog=f"All other flags are those of backtrack.py {bench.name}. No "
                            "file is read, as all weights are random: flags that name files, "
                            "--target, --fake-init, --lr-student and --lr-fake change nothing.")
    parser.add_argument("--batch", type=command.count, nargs="+",
                        help="a table each; default: preset's")
    parser.add_argument("--iterations", type=command.count, default=every,
                        help="of which the mean is taken, three times (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="on by default "
                        "on CUDA", default=torch.cuda.is_available())
    parser.add_argument("--profile", action="store_true",
                        help="the longest kernels of an iteration, instead of the table")
    args, others = parser.parse_known_args(argv)
    return args, others


def main(bench: Bench, every: int, argv: Sequence[str]) -> None:
    """Print a table for each size of batch as soon as it is known, or a profile."""
    args, others = parse(bench, every, argv)
    how = "--compile" if args.compile else "--no-compile"
    # F is counted on a single sample, as what is timed may fill the memory.
    evals, least, flops = evaluations(bench.networks(
        [*others, "--batch", "1", "--accumulate", "1", "--no-compile"]))
    print(bench.name, *others, how, "on", device(), "with torch", torch.__version__)
    print(f"{evals:g} F an iteration, {least} is the least; F is {flops / 1e9:.4g} GFLOP")
    for batch in args.batch or [None]:
        gc.collect()  # and give back what the batch before this left on the device
        torch.cuda.empty_cache()
        torch.compiler.reset()  # what was compiled for another size is of no use
        nets = bench.networks([*others, how, *(["--batch", str(batch)] if batch else [])])
        print(f"batch {nets.config.batch}", flush=True)
        if args.profile:
            print(profile(nets))
        else:
            for row, number in measure(nets, evals, flops, args.iterations).items():
                print(f"{row:40}{number:>12}", flush=True)
        del nets
