"""When does backtracking pay? A declared grid of runs: python -m toy2d.study [--quick]

Every run goes through degrade.main and backtrack.main and leaves one JSON line in lines.jsonl, from
which alone the figures are drawn; a study that was stopped goes on where it was. An arm of a cell
gets the learning rates whose median final SWD is least on the tuning seeds, of the same settings
for every arm, and is judged on other seeds. All arms of a cell have the same budget of network
evaluations: what stage 1 takes, stage 2 lacks.
"""

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import backtrack
import degrade
import disback
from toy2d import figures, mixture, problem

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


# ------------------------------------------------------------------------------------ one run


def execute(grid: Grid, run: tuple) -> dict:
    """Both stages of a run in a folder that does not stay; its line."""
    cell, arm, seed, rates = run
    began, batch, judged = time.perf_counter(), batch_of(grid, cell), seed in grid.seeds
    flags = {"seed": seed, **CELLS[cell], **dict(grid.flags)}
    own = {name: value for name, value in ARMS[arm].items() if name not in ("control", *OF_BOTH)}
    flags |= {name: ARMS[arm][name] for name in OF_BOTH if name in ARMS[arm]}
    flags["preset"] = flags.pop("data")
    line = {"cell": cell, "arm": arm, "seed": seed, "rates": rates,
            "settings": settings(grid, cell, arm),
            "versions": f"{sys.version.split()[0]} {torch.__version__}"}  # Python, torch
    measure = judged and cell in HALVES and arm in MAP_ARMS
    data = CELLS[cell]["data"]
    with tempfile.TemporaryDirectory() as folder, quiet(), spy(data, measure) as found:
        stage1 = record(Path(folder), flags, arm) if ARMS[arm] != VSD else 0
        steps = grid.budget[cell] - math.ceil(stage1 / (8 * batch))
        every = max(steps // 12, 1) if judged else steps  # of a tuning run, only the end
        own |= {"steps": steps, "log_every": every, "save_every": 2 * every,
                "lr_student": rates[0], "lr_fake": rates[1]}
        rows, ending = distil(Path(folder), flags | own)
    if not judged and "final" in ending:
        ending["final"] = {name: ending["final"][name] for name in ("swd", "mode_tv", "off_mode")}
    if measure:
        line["halves"] = [[kevals(stage1, 8 * batch * step), *(round(error, 3) for error in two)]
                          for step, *two in found]
    return line | ending | {"stage1": stage1, "steps": steps,
                            "curve": curve(rows, stage1) if judged else {},
                            "seconds": round(time.perf_counter() - began, 1)}


def record(out: Path, flags: dict, arm: str) -> int:
    """Stage 1, and the control that the arm makes of its path; the evaluations that it took."""
    degrade.main(["toy2d", "--out", str(out), *words(flags | STAGE1)])
    if "control" in ARMS[arm]:
        rewrite(out / "path", ARMS[arm]["control"])
    return disback.Path(out / "path").about["network_evals"]


def distil(out: Path, flags: dict) -> tuple[list[dict], dict]:
    """Stage 2: the rows of its log, and how it ended, a divergence being an end as well."""
    try:
        backtrack.main(["toy2d", "--out", str(out), *words(flags)])
        metrics = disback.load_json(out / "metrics.json", "")
        names = ("swd", "energy_distance", "mode_tv", "off_mode", "modes_missed", "node")
        ending = {"final": {name: round(metrics[name], 4) for name in names}}
    except disback.Refusal as refusal:
        if "try lower learning rates" not in str(refusal):
            raise
        ending = {"failed": str(refusal).split(";")[0]}
    log = out / "log.jsonl"
    return [json.loads(row) for row in log.read_text().splitlines()] if log.exists() else [], ending


def curve(rows: list[dict], stage1: int) -> dict[str, list]:
    """The log in columns, rounded; in "kevals" are thousands of evaluations, those of stage 1 too,
    and "mismatch" is the mean since the row before."""
    columns = {"kevals": [kevals(stage1, row["network_evals"]) for row in rows]}
    for name, digits in (("swd", 3), ("mode_tv", 2), ("off_mode", 2), ("mismatch", 2)):
        columns[name] = [float(f"{row[name]:.{digits}g}") for row in rows]
    return columns


def kevals(stage1: int, stage2: int) -> int:
    return round((stage1 + stage2) / 1e3)


def settings(grid: Grid, cell: str, arm: str) -> str:
    """All flags but seed, rates and the steps, and a hash of the values of those not given."""
    flags = CELLS[cell] | dict(grid.flags) | ARMS[arm]
    flags |= {"stage1": STAGE1["steps"], "budget": grid.budget[cell]}
    # A field that came later changes nothing at its default.
    presets = repr(problem.PRESETS).replace("precision='fp32', ", "")
    defaults = hashlib.sha256(presets.encode()).hexdigest()[:8]
    return " ".join([f"defaults={defaults}", *(f"{name}={flags[name]}" for name in flags)])


def words(flags: dict) -> list[str]:
    return [word for name in flags for word in (f"--{name.replace('_', '-')}", str(flags[name]))]


def rewrite(folder: Path, control: str) -> None:
    """Make a control of a recorded path. "forward": the target meets the nodes in the order in
    which they were recorded, the teacher last all the same. "interpolated": the nodes between the
    two ends lie on the straight line in weight space, at equal distances."""
    path = disback.Path(folder)
    last, old = len(path) - 1, [file.replace(file.with_suffix(".old")) for file in path.files]
    about = {name: value for name, value in path.about.items() if name != "sha256"}
    if control == "forward":
        nodes = [old[0], *old[-2:0:-1], old[-1]]
    else:
        nodes, teacher, degraded = [], load_file(old[0]), load_file(old[-1])
        for node in range(last + 1):
            nodes.append(folder / f"{node}.new")
            disback.save_tensors(nodes[-1], {name: torch.lerp(teacher[name], degraded[name],
                                                              node / last) for name in teacher})
    ends = [about["positions"][0], about["positions"][-1]]  # those between are no longer known
    disback.Path.create(folder, nodes, **about | {"positions": ends, "control": control})


@contextlib.contextmanager
def replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No figures, no progress of the stages."""
    with (replaced(figures, "draw", lambda *_: None), contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO())):
        yield


@contextlib.contextmanager
def spy(data: str, measure: bool) -> Iterator[list[tuple[int, float, float]]]:
    """Without checkpoints, which nobody would resume; and, if `measure`, with both halves of the
    mismatch, (step, teacher's, fake's), often while a target walks, then every 50 iterations."""
    found, nets, step = [], [], 0
    ready, walk_on = disback.ready, disback.Walk.step

    def remember(net: torch.nn.Module, *args: object, trained: bool = False,
                 **rest: object) -> torch.nn.Module:
        if trained:  # in stage 2 the student, then the fake
            nets.append(net)
        return ready(net, *args, trained=trained, **rest)

    def look(walk: disback.Walk, mismatch: torch.Tensor) -> bool:
        nonlocal step
        step += 1
        if measure and (step in EARLY or step % 50 == 0):
            teacher = copy.deepcopy(walk.target)
            if walk.path:
                walk.path.load(0, teacher)
            student, fake = nets[-2:]
            found.append((step, *halves(teacher, fake, student, getattr(mixture, data)(),
                                        problem.PRESETS[data].sigma_max)))
        return walk_on(walk, mismatch)

    with (replaced(disback, "save_state", lambda *_, **__: None),
          replaced(disback, "ready", remember), replaced(disback.Walk, "step", look)):
        yield found


@torch.no_grad()
def halves(teacher: Callable, fake: Callable, student: Callable, data: mixture.Mixture,
           sigma_max: float, n: int = 500, m: int = 4000) -> tuple[float, float]:
    """The exact errors of the two scores of Eq. 8 at the student's noised samples, in the unit of
    disback.distance: the teacher's against the data's denoiser, and the fake's against that of the
    student's own distribution (m of its samples; below sigma 0.1 these are too few, so that sigma
    is log-uniform from 0.1 to sigma_max). Leaves torch's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x0, own = student(torch.randn(n, 2)), student(torch.randn(m, 2))
        sigma = 0.1 * (sigma_max / 0.1) ** torch.rand(n, 1)
        x = x0 + sigma * torch.randn(n, 2)
    right = data.denoise(x, sigma), mixture.Mixture.of_samples(own).denoise(x, sigma)
    return tuple(disback.distance(net(x, sigma, None), exact, sigma).item()
                 for net, exact in zip((teacher, fake), right))


# ------------------------------------------------------------------------------------ the lines


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


@contextlib.contextmanager
def appending(file: Path) -> Iterator[Callable[[dict], None]]:
    """A function that adds a line, in one write that is on the disk when it returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+", buffering=0) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise disback.Refusal(f"{file} is being written by another study: wait") from error
        whole = handle.seek(0, 2) == 0 or handle.seek(-1, 2) >= 0 and handle.read(1) == b"\n"

        def append(line: dict) -> None:
            handle.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            os.fsync(handle.fileno())

        if not whole:
            handle.write(b"\n")  # a line that was cut off must not swallow the next
        yield append


# ------------------------------------------------------------------------------------ the study


def follow_parent() -> None:
    """A worker whose parent was killed would wait for work for ever; an interrupt is the parent's
    to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def study(grid: Grid, file: Path, jobs: int, skip_corrupt: bool = False) -> dict[tuple, dict]:
    """Run what the lines lack of the grid: first what needs no tuning, then what did."""
    with appending(file) as append:
        lines = read(file, skip_corrupt)
        check(grid, lines, file)
        for cell in grid.arms:  # trains each teacher, once
            flags = CELLS[cell] | dict(grid.flags)
            problem.make(flags["data"], **{k: v for k, v in flags.items() if k != "data"})
        todo = [run for run in runs(grid, lines) if run not in lines]
        if todo and not lines:  # one, to know how long it takes
            first = todo.pop(0)
            lines[first] = execute(grid, first)
            append(lines[first])
        seconds = statistics.mean(line["seconds"] for line in lines.values()) if lines else 0
        print(f"{len(todo)} runs of about {seconds:.1f} s to do, {len(lines)} done: "
              f"{len(todo) * seconds / jobs / 60:.0f} minutes on {jobs} processes", flush=True)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, follow_parent) as pool:
            while todo := [run for run in runs(grid, lines) if run[3] and run not in lines]:
                futures = [pool.submit(execute, grid, run) for run in todo]
                try:
                    for future in tqdm(as_completed(futures), "runs", len(todo), smoothing=0.02):
                        append(future.result())
                        lines[key(future.result())] = future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return lines


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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("study.py", description=__doc__, allow_abbrev=False)
    parser.error = disback.refuse
    parser.add_argument("--quick", action="store_true", help="a small grid of some minutes")
    parser.add_argument("--out", type=Path, help="folder of lines.jsonl and the figures (default: "
                        "toy2d/study, or runs/study of a quick one)")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these: " + " ".join(CELLS))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these: " + " ".join(ARMS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--figures-only", action="store_true", help="draw the lines that are there")
    parser.add_argument("--skip-corrupt", action="store_true", help="go on past corrupt lines")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        disback.refuse(f"--jobs must be at least 1, not {args.jobs}")
    whole = QUICK if args.quick else FULL
    grid = select(whole, args.cells, args.arms)
    file = (args.out or (Path("runs/study") if args.quick else FOLDER)) / "lines.jsonl"
    if args.figures_only and not file.exists():
        raise disback.Refusal(f"{file} does not exist: run the study first")
    if not args.figures_only:
        study(grid, file, args.jobs, args.skip_corrupt)
    from toy2d import study_figures

    study_figures.draw(file.parent, whole, read(file, args.skip_corrupt))


if __name__ == "__main__":
    disback.run(main)
