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


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The least of 5 means over `repeats` calls, after a warm-up."""
    means = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        means.append((time.perf_counter() - began) / repeats * 1e3)
    return min(means[1:])


def networks_alone(made: disback.Problem, repeats: int) -> tuple[float, float]:
    """Milliseconds of one forward of the score network, and of all forwards and backwards of an
    iteration with one update of the fake, in their order and nothing else: student, fake, target,
    student's backward, fake both. On the CPU: nothing waits for another device."""
    n, target, fake = made.config.batch, made.teacher, copy.deepcopy(made.teacher)
    z, cond = made.sample_inputs(n)
    sigma = made.sample_sigma(n)
    x = made.generate(made.student, z, cond).detach()

    def forward():
        with torch.no_grad():
            target(x, sigma, cond)

    def iteration():
        x0 = made.generate(made.student, z, cond)
        with torch.no_grad():
            fake(x, sigma, cond), target(x, sigma, cond)
        x0.mean().backward()
        fake(x, sigma, cond).mean().backward()

    return milliseconds(forward, repeats), milliseconds(iteration, repeats)


def backtrack(name: str, steps: int) -> tuple[dict, float]:
    """metrics.json of a run in a process of its own, and milliseconds that a tenth of it took: the
    least of its last 5, each with one evaluation and one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        every = str(steps // 10)
        subprocess.run([sys.executable, "backtrack.py", name, "--target", "teacher", "--out",
                        folder, "--steps", str(steps), "--log-every", every, "--save-every", every],
                       cwd=Path(__file__).parent.parent, check=True, capture_output=True)
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        metrics = disback.load_json(Path(folder) / "metrics.json", "")
    at = [json.loads(line)["seconds"] for line in lines[-6:]]
    return metrics, min(b - a for a, b in zip(at, at[1:])) * 1e3


def report(name: str, made: disback.Problem, repeats: int, short: int, long: int) -> None:
    """Print the table of a problem: times from the long run, memory of both."""
    one, alone = networks_alone(made, repeats)
    few, _ = backtrack(name, short)
    many, tenth = backtrack(name, long)
    evaluation = milliseconds(lambda: made.evaluate(made.student), 1)
    iteration = (tenth - evaluation) / (long / 10)
    batch = made.config.batch
    evals = many["network_evals"]["stage2"] / many["steps"] / batch
    print(f"one forward of the score network, batch {batch:<10} {one:8.3f} ms")
    print(f"forwards and backwards of an iteration alone      {alone:8.3f} ms")
    print(f"an iteration of backtrack.py                      {iteration:8.3f} ms")
    print(f"  / its forwards and backwards alone              {iteration / alone:8.2f}")
    print(f"  / {evals:.0f} evaluations of one forward's time          "
          f"{iteration / evals / one:8.2f}")
    for steps, run in ((short, few), (long, many)):
        print(f"peak memory after {steps:6,} iterations           "
              f"{run['peak_memory_bytes'] / 2**20:8.1f} MiB")


if __name__ == "__main__":
    report("toy2d", problem.make(), repeats=500, short=1000, long=10_000)
