"""Does everything run on this machine's accelerator, and does it say what a CPU says?

    python -m runtime.check [PROBLEM ...]

Each problem's smallest preset: its losses in float32 against the CPU's, in bfloat16 and compiled
against float32; both stages in bfloat16; a stage stopped and resumed, and one that a CPU had begun.
Prints a line for each check as it is made; ends with 1 where one fell short. Without an accelerator
the CPU is compared with itself; what is compiled and what a CPU had begun are left out. It starts
the stages as a user does, and nothing imports it.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import disback
from runtime import command, errors, place, ranks

ROOT = Path(__file__).parent.parent
PROBLEMS = sorted(file.parent.name for file in ROOT.glob("*/problem.py"))
SMALL = {"toy2d": ["--teacher-steps", "100"], "imagenet64": ["--teacher-steps", "20"]}
STARTED: list[subprocess.Popen] = []  # stages, of any thread
FP32, BF16 = 1e-4, 0.05  # the largest relative differences; bfloat16 has eight bits


def losses(name: str, inputs: tuple, device: torch.device | str, precision: str = "fp32",
           compiled: bool = False) -> Tensor:
    """Of a problem's smallest preset: the mismatch degree, the norm of the student's gradient, the
    score-matching loss and the norm of the fake's gradient; float64 [4], on the CPU.

    `inputs` are those of `draw`. The fake is the teacher with weights a tenth larger."""
    module = importlib.import_module(f"{name}.problem")
    preset = next(iter(module.PRESETS))
    made = module.make(dataclasses.replace(
        module.PRESETS[preset], precision=precision, **fields(SMALL.get(name, []))), 0, device)
    student, target, fake = made.student, made.teacher, copy.deepcopy(made.teacher)
    with torch.no_grad():
        for weight in fake.parameters():
            weight *= 1.1
    flags = argparse.Namespace(shard=False, compile=compiled)
    for net in (student, target, fake):
        place.ready(net, flags, made.blocks)
    z, cond, sigma, sigma_vsd, eps = moved(inputs, device)
    x0 = made.generate(student, z, cond)
    loss, mismatch = disback.vsd_loss(
        x0, sigma_vsd, fake, lambda *x: made.guide(target, *x), cond, "x0", eps)
    loss.backward()
    score = disback.score_matching_loss(
        fake, x0.detach(), sigma, cond, made.score_weight(sigma), eps)
    score.backward()
    norms = [torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
             for net in (student, fake)]
    return torch.stack([mismatch, norms[0], score.detach(), norms[1]]).double().cpu()


def draw(name: str, n: int = 4) -> tuple:
    """z, cond, the sigmas of both losses and noise, for n samples, on the CPU; always the same."""
    module = importlib.import_module(f"{name}.problem")
    preset = next(iter(module.PRESETS.values()))
    made = module.make(dataclasses.replace(preset, **fields(SMALL.get(name, []))))
    torch.manual_seed(0)
    z, cond = made.sample_inputs(n)
    return z, cond, made.sample_sigma(n), made.sample_sigma_vsd(n), torch.randn_like(z)


def fields(flags: Sequence[str]) -> dict[str, int]:
    """Flags as fields of a config."""
    return {flag[2:].replace("-", "_"): int(value) for flag, value in zip(flags[::2], flags[1::2])}


def moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(inner, device) for inner in value)
    if isinstance(value, dict):
        return {name: moved(inner, device) for name, inner in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Products of float32 in float32: TF32, which the stages allow, has ten bits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of any number; none between 0 and 0."""
    apart = (found - expected).abs() / expected.abs()
    return apart.where((found != 0) | (expected != 0), 0).max().item()


def compare(name: str, report: Callable) -> None:
    """The losses' lines."""
    device, inputs = ranks.device(), draw(name)
    with no_tf32():
        cpu, here = losses(name, inputs, "cpu"), losses(name, inputs, device)
        report(name, "losses in fp32, against a CPU's", apart(here, cpu), FP32)
        if device.type == "cuda":  # on a CPU it takes minutes, and the suite looks at it elsewhere
            found = losses(name, inputs, device, compiled=True)
            report(name, "losses compiled, against not", apart(found, here), FP32)
    report(name, "losses in bf16, against fp32", apart(
        losses(name, inputs, device, "bf16"), here), BF16)


def run_stages(name: str, steps: int, report: Callable) -> None:
    """The lines of both stages as a user starts them, stopped and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder, "run"), time.perf_counter()
        common = [name, "--precision", "bf16", "--steps", str(steps), "--log-every", "2",
                  *SMALL.get(name, [])]
        said = stage("degrade.py", *common, "--out", out, "--nodes", "4")
        report(name, "degrade.py in bf16", time.perf_counter() - began, said=said)
        began = time.perf_counter()
        walk = ["backtrack.py", *common, "--interval", "3", "--save-every", "4"]
        said = said or stage(*walk, "--out", out)
        report(name, "backtrack.py in bf16", time.perf_counter() - began, said=said)
        for where, env in {"this machine": {}, "a CPU": {"CUDA_VISIBLE_DEVICES": ""}}.items():
            if said or env and ranks.device().type == "cpu":
                continue
            began, again = time.perf_counter(), Path(folder, where)
            shutil.copytree(out / "path", again / "path")
            resumed = stop(again, *walk, "--no-compile", env=env) or stage(
                *walk, "--no-compile", "--out", again, "--resume")
            report(name, f"stopped on {where}, resumed here", time.perf_counter() - began,
                   said=resumed)


def stage(*argv: Any) -> str:
    """Run a stage to its end; what it said last where it failed."""
    run = started(*argv)
    said = run.communicate()[1]
    return last_line(said, run.returncode) if run.returncode else ""


def stop(out: Path, *argv: str, env: dict) -> str:
    """Run a stage until its first checkpoint, and stop it as a cluster does."""
    run = started(*argv, "--out", out, env=env)
    while run.poll() is None and not (out / "state.pt").exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate()[1]
    killed = run.returncode == -signal.SIGKILL
    return last_line(said, run.returncode) if killed or not (out / "state.pt").exists() else ""


def started(*argv: Any, env: dict | None = None) -> subprocess.Popen:
    cache = {"DISBACK_CACHE": errors.cache()}  # ours, which may be relative to another folder
    STARTED.append(subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=ROOT, env={**os.environ, **cache, **(env or {})},
        text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    return STARTED[-1]


def last_line(said: str, status: int) -> str:
    return (said.strip() or f"status {status}").splitlines()[-1]


def main(argv: Sequence[str]) -> None:
    parser = command.parser("python -m runtime.check", __doc__)
    parser.add_argument("problems", nargs="*", default=PROBLEMS, metavar="PROBLEM",
                        type=lambda word: word.rstrip("/") or word,  # a shell writes toy2d/
                        help=f"of {', '.join(PROBLEMS)} (default: all)")
    parser.add_argument("--steps", type=command.count, default=20,
                        help="of either stage (default: 20)")
    args = parser.parse_args(argv)
    if unknown := sorted({*args.problems} - {*PROBLEMS}):
        command.refuse(f"there is no problem {unknown[0]}")
    if args.steps < 8:
        command.refuse(f"--steps must be at least 8, not {args.steps}")
    failed, stopped = [], threading.Event()

    def report(name: str, what: str, seen: float, most: float | None = None,
               said: str = "") -> None:
        if stopped.is_set():  # a stage that was killed for it has not failed
            return
        good = not said and (most is None or seen <= most)
        numbers = f"{seen:10.2g} {most:8.0e}" if most else f"{seen:8.1f} s {'':8}"
        print(f"{name:12}{what:36}{numbers}  {'ok' if good else 'FAILED ' + said}", flush=True)
        failed.extend([] if good else [what])

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, not compiled"
    print(f"{where}, torch {torch.__version__}")
    print(f"{'problem':12}{'check':36}{'seen':>10}{'at most':>9}", flush=True)
    with ThreadPoolExecutor() as pool:  # each stage is a process of its own
        runs = [pool.submit(run_stages, name, args.steps, report) for name in args.problems]
        try:
            for name in args.problems:
                compare(name, report)
            for run in runs:
                run.result()
        except BaseException:  # an interrupt waits for no stage
            stopped.set()
            while not all(run.cancel() or run.done() for run in runs):
                for begun in STARTED:
                    begun.kill()
                time.sleep(0.1)
            raise
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    command.run(main)
