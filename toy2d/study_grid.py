"""The study's declared grid, and its lines: what is run, what was run, which rates were chosen."""

import dataclasses
import hashlib
import json
import math
import statistics
import sys
from pathlib import Path

import disback
from toy2d import problem

FOLDER = Path(__file__).parent / "study"
# From far off, stage 1 at its default rate makes a path that throws the student away; this rate
# was found on tuning seeds.
FAR = {"distance": 28, "lr_degrade": 1e-3}
STARTS = {"copy": {"start": "teacher"}, "8": {"distance": 8}, "16": {"distance": 16}, "28": FAR}
WEIGHTINGS = ("eps", "x0", "dmd")
# Flags of both stages. "poor": a teacher of 300 training steps, whose answers far off mislead.
CELLS = {f"ring-{start}-{w}": {"data": "ring", **flags, "weighting": w}
         for start, flags in STARTS.items() for w in WEIGHTINGS}
CELLS |= {f"poor-8-{w}": {**CELLS[f"ring-8-{w}"], "teacher_steps": 300} for w in WEIGHTINGS}
CELLS |= {f"{data}-28-eps": {"data": data, **FAR, "weighting": "eps"}
          for data in ("grid", "uneven")}
CELLS["short-8-eps"] = CELLS["ring-8-eps"]  # half the budget

STAGE1 = {"steps": 100}  # half the default: it is paid from a budget that is short here
VSD = {"target": "teacher"}
OF_BOTH = ("nodes", "spacing")  # flags of stage 1, too
ARMS = {  # flags of stage 2; "control" rewrites the path between
    "vsd_tuned": VSD,
    "disback": {},
    "vsd": VSD,  # the only arm that is not tuned: the stage's own rates
    "degraded_fake": VSD | {"fake_init": "degraded"},
    "path_teacher_fake": {"fake_init": "teacher"},
    "adaptive": {"switch": "adaptive"},
    "forward": {"control": "forward"},
    "interpolated": {"control": "interpolated"},
    "linear": {"spacing": "linear"},
    "log": {"spacing": "log"}}
# The trade between nodes and interval. 1 node is the degraded start alone: its target is node 0.
ARMS["n1_i10"] = {"nodes": 1}
ARMS |= {f"n{n}_i{i}": {"nodes": n, "interval": i} for n in (3, 10, 30) for i in (3, 10, 33)
         if n * i < 400 and (n, i) != (10, 10)}  # (10, 10) is DisBack's; 30 x 33 does not end
MAP_ARMS = ("vsd_tuned", "disback")
CONSTANT_WALK = ("n1_i10", "n3_i33", "n30_i3")  # together about as many iterations at nodes
EARLY = (1, 5, 10, 20, 30, 45, 60, 75, 90)  # iterations; then the target is the teacher
HALVES = ("ring-8-eps", "ring-28-eps", "poor-8-eps")  # cells where the mismatch is measured
ABLATION = (*list(ARMS)[2:10], *CONSTANT_WALK)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is run: the arms of each cell, and its budget in iterations of plain VSD."""

    arms: dict[str, tuple[str, ...]]
    budget: dict[str, int]
    rates: tuple[tuple[float, float], ...]  # (student's, fake's): what every tuned arm may choose
    tuning: tuple[int, ...]
    seeds: tuple[int, ...]
    flags: tuple[tuple[str, float], ...] = ()  # of both stages, for all runs
    swept: tuple[str, ...] = ()  # cells whose map arms run at all rates on all seeds


FULL = Grid({name: MAP_ARMS for name in CELLS} | {
    "ring-8-eps": (*MAP_ARMS, *ABLATION[:7]), "poor-8-eps": tuple(ARMS)},
    {name: 600 for name in CELLS} | {"grid-28-eps": 1000, "short-8-eps": 300},
    ((3e-3, 3e-3), (6e-3, 6e-3), (1.2e-2, 1.2e-2), (2.4e-2, 2.4e-2), (6e-3, 1.2e-2)),
    tuple(range(100, 103)), tuple(range(10)), swept=("ring-8-eps", "poor-8-eps"))
QUICK = Grid({"ring-copy-eps": MAP_ARMS, "ring-8-eps": MAP_ARMS, "ring-28-eps": MAP_ARMS,
              "poor-8-eps": (*MAP_ARMS, "vsd", "degraded_fake", "adaptive", "forward", "n3_i33")},
             {name: 400 for name in CELLS}, FULL.rates[1:4], (100, 101), (0, 1, 2))


def runs(grid: Grid, lines: dict[tuple, dict]) -> list[tuple]:
    """All runs (cell, arm, seed, rates) of the grid whose rates are known; rates None for those
    that wait for an unfinished tuning."""
    found = []
    for cell, arms in grid.arms.items():
        for arm in arms:
            if arm != "vsd":
                found += [(cell, arm, seed, rates) for rates in grid.rates for seed in grid.tuning]
            rates = chosen(grid, lines, cell, arm)
            found += [(cell, arm, seed, rates) for seed in grid.seeds]
            if cell in grid.swept and arm in MAP_ARMS:
                found += [(cell, arm, seed, rates) for rates in grid.rates for seed in grid.seeds]
    return list(dict.fromkeys(found))


def chosen(grid: Grid, lines: dict[tuple, dict], cell: str, arm: str) -> tuple | None:
    """The rates with the least median final SWD on the tuning seeds, which are all that it reads;
    None before all of those runs are there."""
    if arm == "vsd":
        config = problem.PRESETS["ring"]
        return config.lr_student, config.lr_fake
    medians = {}
    for rates in grid.rates:
        ends = [lines.get((cell, arm, seed, rates)) for seed in grid.tuning]
        if None in ends:
            return None
        medians[rates] = statistics.median(final_swd(line) for line in ends)
    return min(medians, key=medians.get)


def final_swd(line: dict) -> float:
    """Infinite for a run that diverged."""
    return math.inf if "failed" in line else line["final"]["swd"]


def settings(grid: Grid, cell: str, arm: str) -> str:
    """All flags but seed, rates and the steps, and a hash of the values of those not given."""
    flags = CELLS[cell] | dict(grid.flags) | ARMS[arm]
    flags |= {"stage1": STAGE1["steps"], "budget": grid.budget[cell]}
    # A field that came later changes nothing at its default.
    presets = repr(problem.PRESETS).replace("precision='fp32', ", "")
    defaults = hashlib.sha256(presets.encode()).hexdigest()[:8]
    return " ".join([f"defaults={defaults}", *(f"{name}={flags[name]}" for name in flags)])


def key(line: dict) -> tuple:
    return line["cell"], line["arm"], line["seed"], tuple(line["rates"])


def batch_of(grid: Grid, cell: str) -> int:
    """Samples in a batch."""
    return dict(CELLS[cell], **dict(grid.flags)).get("batch", problem.PRESETS["ring"].batch)


def read(file: Path, skip_corrupt: bool = False) -> dict[tuple, dict]:
    """The lines by run. Refuses a corrupt line by its number, or tells that it skips it."""
    lines = {}
    for number, text in enumerate(file.read_bytes().splitlines(True) if file.exists() else (), 1):
        try:
            if not text.endswith(b"\n"):
                raise ValueError("it was cut off")
            line = json.loads(text)
            found = key(line)
            assert final_swd(line) >= 0 and isinstance(line["curve"], dict)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            what = f"{file}, line {number}, is corrupt ({type(error).__name__}: {error})"
            if not skip_corrupt:
                raise disback.Refusal(f"{what}: mend it, or repeat its run by --skip-corrupt"
                                      ) from error
            print(f"skipped: {what}", file=sys.stderr)
            continue
        if found in lines:
            raise disback.Refusal(f"{file}, line {number}, repeats the run {found}: remove it")
        lines[found] = line
    return lines


def check(grid: Grid, lines: dict[tuple, dict], file: Path) -> None:
    """Refuse lines of this grid's cells and arms that were made by other settings."""
    for (cell, arm, *_), line in lines.items():
        if arm in grid.arms.get(cell, ()) and line["settings"] != settings(grid, cell, arm):
            raise disback.Refusal(f"{file} has runs of {cell}, {arm} of other settings "
                                  f"({line['settings']}): name another --out")


def select(grid: Grid, cells: list[str] | None, arms: list[str] | None) -> Grid:
    """The part of the grid that is asked for; refuses names that it does not have."""
    there = {"--cells": list(grid.arms), "--arms": sorted({a for v in grid.arms.values()
                                                           for a in v}, key=list(ARMS).index)}
    for flag, names in (("--cells", cells), ("--arms", arms)):
        for name in names or ():
            if name not in there[flag]:
                raise disback.Refusal(f"{flag} has no {name!r}, but {', '.join(there[flag])}")
    kept = {cell: tuple(arm for arm in grid.arms[cell] if not arms or arm in arms)
            for cell in grid.arms if not cells or cell in cells}
    return Grid(**vars(grid) | {"arms": kept})
