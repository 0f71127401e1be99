"""When does backtracking pay, and why? python -m toy2d.study

A job is a seed of an arm in a cell at several learning rates, which study_runs.py advances
together. It leaves one JSON line in lines.jsonl, from which alone the figures are drawn; a study
that was stopped goes on. README.md beside this file reads the figures.
"""

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import disback
from runtime import command, files
from runtime.study import appending, follow_parent
from toy2d import study_figures, study_runs

FOLDER = Path(__file__).parent / "study"
# Flags of both stages, and of stage 2 alone. "budget" is in iterations of plain VSD, stage 1
# included. "default" and 16 dimensions, which need it, have the preset's own. The others have half
# its batch, a quarter of its iterations and a shorter average: a run takes seconds.


def short(weighting: str = "half", **flags: object) -> dict:
    return {"both": {"batch": 128} | flags, "stage2": {"weighting": weighting, "ema": 0.95},
            "budget": 1000}


def long(**flags: object) -> dict:
    return {"both": flags, "budget": 4000}


LONG = {"default": long(data="ring"),
        **{f"16D d{distance}": long(data="ring16", distance=distance or 1e-3)
           for distance in (0, 4, 8, 16)}}
CELLS = LONG | {
    **{f"2D d{distance}": short(distance=distance) for distance in (4, 8, 12, 16)},
    **{f"4D d{distance}": short(data="ring4", distance=distance) for distance in (4, 8, 16)},
    "2D d8 eps": short("eps"), "poor teacher": short(teacher_steps=300),
    "Karras noise": short(noise="karras")}
STAGE1 = {"steps": 100}
PATH = {"stage1": STAGE1}
ARMS = {
    "vsd": {"stage2": {"target": "teacher"}},
    "disback": PATH,
    "degraded fake": PATH | {"stage2": {"target": "teacher", "fake_init": "degraded"}},
    "vsd k2": {"stage2": {"target": "teacher", "fake_updates": 2}},
    "disback k2": PATH | {"stage2": {"fake_updates": 2}},
    "teacher's fake": PATH | {"stage2": {"fake_init": "teacher"}},
    "forward": PATH | {"control": "forward"},
    "interpolated": PATH | {"control": "interpolated"},
    **{f"{n} nodes": {"stage1": STAGE1 | {"nodes": n}} for n in (1, 3, 30)},
    **{f"interval {i}": PATH | {"stage2": {"interval": i}} for i in (3, 30)},
    **{spacing: {"stage1": STAGE1 | {"spacing": spacing}} for spacing in ("linear", "log")},
    "adaptive": PATH | {"stage2": {"switch": "adaptive"}}}
MAIN, ABLATION = list(ARMS)[:5], list(ARMS)[5:]
CONFIRMED = ("vsd", "disback", "vsd k2")  # on seeds that no sentence was written from
ABLATED, WATCHED = ("4D d8", "2D d8 eps"), ("default", "4D d8", "2D d8 eps")
# Learning rates of student and fake: alike, and a faster fake.
ALIKE = tuple((rate, rate) for rate in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3))
FASTER = ((4e-3, 8e-3), (8e-3, 16e-3))
SEEDS, FRESH = tuple(range(10)), tuple(range(200, 210))
# What is run in this order, what tells most first: cells, arms, rates, seeds.
CHEAP = tuple(cell for cell in CELLS if cell not in LONG)
PLAN = [
    (("4D d8",), CONFIRMED, ALIKE[1:3], FRESH), (("2D d8 eps",), MAIN[:4], ALIKE[:3], SEEDS),
    (("4D d16", "2D d16"), CONFIRMED, ALIKE[1:4], SEEDS),
    (("2D d8",), MAIN[:4], ALIKE[:3], SEEDS), (("4D d8",), ABLATION, ALIKE[1:3], SEEDS),
    (("4D d4", "2D d4", "2D d12"), MAIN[:2], ALIKE[1:4], SEEDS),
    (("16D d8", "16D d4", "16D d16"), MAIN[:2], ALIKE[2:3], SEEDS),
    (("2D d8 eps",), CONFIRMED, ALIKE[1:3], FRESH), (("default",), MAIN[:4], ALIKE[1:2], SEEDS),
    (("poor teacher", "Karras noise"), MAIN[:4], ALIKE[1:4], SEEDS),
    (("2D d8 eps",), ABLATION, ALIKE[1:3], SEEDS), (("16D d0",), MAIN[:2], ALIKE[2:3], SEEDS),
    (CHEAP, MAIN[:4], ALIKE, SEEDS), (("default",), MAIN[:4], ALIKE[:3], SEEDS),
    (ABLATED, MAIN, ALIKE + FASTER, SEEDS)]
QUICK = [(("4D d8",), MAIN[:2], ALIKE[1::2], SEEDS[:3])]
Run = tuple[str, str, int, tuple[float, float]]  # cell, arm, seed, rates
Lines = dict[Run, dict]


def jobs(plan: list[tuple], lines: Lines) -> Iterator[tuple]:
    """(cell, arm, seed, rates) of what the lines lack; each run once."""
    seen = set(lines)
    for cells, arms, rates, seeds in plan:
        for cell in cells:
            for seed in seeds:
                for arm in arms:
                    left = [pair for pair in rates if (cell, arm, seed, pair) not in seen]
                    seen |= {(cell, arm, seed, pair) for pair in left}
                    # The mismatch that an adaptive target waits for is one run's.
                    groups = [[pair] for pair in left] if arm == "adaptive" else [left]
                    yield from ((cell, arm, seed, tuple(group)) for group in groups if group)


def execute(job: tuple) -> dict:
    """A job's line."""
    cell, arm, seed, rates = job
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        found = study_runs.advance(Path(out), CELLS[cell], ARMS[arm], seed, rates,
                                   CELLS[cell]["budget"], cell in WATCHED)
    return {"cell": cell, "arm": arm, "seed": seed, "rates": rates, "settings": settings(cell, arm),
            "seconds": round(time.perf_counter() - began, 1), **rounded(found)}


def settings(cell: str, arm: str) -> int:
    """A number that changes with the flags."""
    return zlib.crc32(repr((CELLS[cell], ARMS[arm])).encode())


def rounded(value: object) -> object:
    """Three digits are kept; null stands for what is not finite."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    return value


def read(file: Path) -> Lines:
    """Every run of the file. Refuses by its number a line that is corrupt, of other settings, or of
    a run that was there before."""
    lines = {}
    for number, text in enumerate(file.read_bytes().splitlines(True) if file.exists() else (), 1):
        with files.blame(f"{file}, line {number}, is of no use: remove it to repeat its runs"):
            line = json.loads(text)
            assert text.endswith(b"\n"), "it was cut off"
            found = runs_of(line)
            assert line["settings"] == settings(line["cell"], line["arm"]), "of other settings"
            assert not found.keys() & lines.keys(), "it repeats a run"
        lines |= found
    return lines


def runs_of(line: dict) -> Lines:
    """The runs of a job's line, each with its own numbers."""
    of_each = ("swd", "spread", "away", "bias", "teacher")
    return {(line["cell"], line["arm"], line["seed"], tuple(pair)):
            {"steps": line["steps"], "stage1": line["stage1"],
             "final": {name: ends[i] for name, ends in line["final"].items()},
             **{name: line[name][i] for name in of_each if name in line}}
            for i, pair in enumerate(line["rates"])}


def study(plan: list[tuple], file: Path, processes: int) -> None:
    """Run what the lines lack of the plan."""
    with appending(file) as append:
        todo = list(jobs(plan, read(file)))
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, follow_parent) as pool:
            for line in tqdm(pool.imap_unordered(execute, todo), "jobs", len(todo)):
                append(line)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("study.py", description=__doc__, allow_abbrev=False)
    parser.error = command.refuse
    parser.add_argument("--quick", action="store_true", help="one cell: some minutes, runs/study")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--figures-only", action="store_true", help="draw the lines that are there")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        command.refuse(f"--jobs must be at least 1, not {args.jobs}")
    file = (Path("runs/study") if args.quick else FOLDER) / "lines.jsonl"
    if args.figures_only and not file.exists():
        raise disback.Refusal(f"{file} does not exist: run the study first")
    if not args.figures_only:
        study(QUICK if args.quick else PLAN, file, args.jobs)
    study_figures.draw(file.parent, read(file), FRESH)


if __name__ == "__main__":
    command.run(main)
