"""What an iteration of backtrack.py costs beside its networks alone: python -m toy2d.bench

Runs the stage itself, plain VSD at the default size, for 1,000 and for 10,000 iterations (about a
minute), and prints times and memory. No other work should run on the machine meanwhile.
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import disback
from toy2d import problem


def milliseconds(work: Callable[[], object], repeats: int = 500) -> float:
    """The least of 5 means over `repeats` calls, after a warm-up."""
    means = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        means.append((time.perf_counter() - began) / repeats * 1e3)
    return min(means[1:])


def networks_alone() -> tuple[float, float]:
    """Milliseconds of one forward of the score network, and of all forwards and backwards of an
    iteration in their order, nothing else: student, fake, target, student's backward, fake both."""
    toy = problem.make()
    n = toy.config.batch
    z, _ = toy.sample_inputs(n)
    sigma, fake = toy.sample_sigma(n), copy.deepcopy(toy.teacher)
    x = toy.student(z).detach()

    def forward():
        with torch.no_grad():
            toy.teacher(x, sigma)

    def iteration():
        x0 = toy.student(z)
        with torch.no_grad():
            fake(x, sigma), toy.teacher(x, sigma)
        x0.mean().backward()
        fake(x, sigma).mean().backward()

    return milliseconds(forward), milliseconds(iteration)


def backtrack(steps: int) -> tuple[dict, float]:
    """metrics.json of a run in a process of its own, and milliseconds an iteration: the least of
    its last 5 tenths, each with one evaluation, as the networks alone are timed."""
    with tempfile.TemporaryDirectory() as folder:
        every = str(steps // 10)
        subprocess.run([sys.executable, "backtrack.py", "toy2d", "--target", "teacher", "--out",
                        folder, "--steps", str(steps), "--log-every", every, "--save-every", every],
                       cwd=Path(__file__).parent.parent, check=True, capture_output=True)
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        metrics = disback.load_json(Path(folder) / "metrics.json", "")
    at = [json.loads(line)["seconds"] for line in lines[-6:]]
    return metrics, min(b - a for a, b in zip(at, at[1:])) / (steps / 10) * 1e3


def main() -> None:
    one, alone = networks_alone()
    short, _ = backtrack(1000)
    long, iteration = backtrack(10_000)
    batch = problem.Config().batch
    evals = long["network_evals"]["stage2"] / long["steps"] / batch
    print(f"one forward of the score network, {batch} samples   {one:8.3f} ms")
    print(f"forwards and backwards of an iteration alone  {alone:8.3f} ms")
    print(f"an iteration of backtrack.py                  {iteration:8.3f} ms")
    print(f"  / its forwards and backwards alone          {iteration / alone:8.2f}")
    print(f"  / ({evals:.0f} evaluations x one forward)            {iteration / evals / one:8.2f}")
    print(f"peak memory after  1,000 iterations  {short['peak_memory_bytes'] / 2**20:8.1f} MiB")
    print(f"peak memory after 10,000 iterations  {long['peak_memory_bytes'] / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
