"""When does backtracking pay? A declared grid of runs: python -m toy2d.study [--quick]

Every run goes through degrade.main and backtrack.main and leaves one JSON line in lines.jsonl, from
which alone the figures are drawn; a study that was stopped goes on where it was. An arm of a cell
gets the learning rates whose median final SWD is least on the tuning seeds, of the same settings
for every arm, and is judged on other seeds. All arms of a cell have the same budget of network
evaluations: what stage 1 takes, stage 2 lacks.
"""

import argparse
import copy
import dataclasses
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import backtrack
import degrade
import disback
from runtime import command, files, results
from runtime.run import check_finite
from runtime.study import appending, follow_parent, quiet, words
from toy2d import mixture, problem, study_figures
from toy2d.study_grid import (
    ARMS,
    CELLS,
    EARLY,
    FOLDER,
    FULL,
    HALVES,
    MAP_ARMS,
    OF_BOTH,
    QUICK,
    STAGE1,
    VSD,
    Grid,
    batch_of,
    check,
    key,
    read,
    runs,
    select,
    settings,
)

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
    with tempfile.TemporaryDirectory() as folder, quiet():
        stage1 = record(Path(folder), flags, arm) if ARMS[arm] != VSD else 0
        steps = grid.budget[cell] - math.ceil(stage1 / (8 * batch))
        every = max(steps // 12, 1) if judged else steps  # of a tuning run, only the end
        own |= {"steps": steps, "log_every": every, "lr_student": rates[0], "lr_fake": rates[1]}
        rows, found, ending = distil(Path(folder), flags | own, measure)
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
    return disback.DegradationPath(out / "path").about["network_evals"]


def distil(out: Path, flags: dict, measure: bool) -> tuple[list[dict], list[tuple], dict]:
    """Stage 2, without its files: the rows of a log; if `measure`, both halves of the mismatch as
    (step, teacher's, fake's), often while a target walks, then every 50 iterations; and how it
    ended, a divergence being an end as well."""
    args, made, path = backtrack.prepare(["toy2d", "--out", str(out), *words(flags)])
    config, nets, teacher = made.config, backtrack.Networks(args, made, path), None
    made.snapshot()  # draws random numbers, as the stage does
    rows, found, degrees = [], [], []
    if measure:
        teacher = copy.deepcopy(made.teacher)
        if path:
            path.load(0, teacher)
    for step in range(1, config.backtrack_steps + 1):
        samples, mismatch = nets.update_student()
        for i in range(config.fake_updates):
            nets.update_fake(samples if i == 0 else nets.fresh_samples())
        degrees.append(mismatch)
        if step % config.log_every == 0 or step == config.backtrack_steps:
            mean, degrees = torch.stack(degrees).mean().item(), []
            rows.append({"network_evals": results.evals_an_iteration(made) * step,
                         "mismatch": mean, **made.evaluate(nets.average)})
            try:
                check_finite(rows[-1], step, nets.scheduler.node)
            except disback.Refusal as refusal:
                return rows[:-1], found, {"failed": str(refusal)}
        if measure and (step in EARLY or step % 50 == 0):
            found.append((step, *halves(teacher, nets.fake, nets.student,
                                        getattr(mixture, config.data)(), config.sigma_max)))
        nets.scheduler.step(mismatch)
    names = ("swd", "energy_distance", "mode_tv", "off_mode", "modes_missed")
    final = {name: round(rows[-1][name], 4) for name in names}
    return rows, found, {"final": final | {"node": nets.scheduler.node}}


def curve(rows: list[dict], stage1: int) -> dict[str, list]:
    """The log in columns, rounded; in "kevals" are thousands of evaluations, those of stage 1 too,
    and "mismatch" is the mean since the row before."""
    columns = {"kevals": [kevals(stage1, row["network_evals"]) for row in rows]}
    for name, digits in (("swd", 3), ("mode_tv", 2), ("off_mode", 2), ("mismatch", 2)):
        columns[name] = [float(f"{row[name]:.{digits}g}") for row in rows]
    return columns


def kevals(stage1: int, stage2: int) -> int:
    return round((stage1 + stage2) / 1e3)


def rewrite(folder: Path, control: str) -> None:
    """Make a control of a recorded path. "forward": the target meets the nodes in the order in
    which they were recorded, the teacher last all the same. "interpolated": the nodes between the
    two ends lie on the straight line in weight space, at equal distances."""
    path = disback.DegradationPath(folder)
    last, old = len(path) - 1, [file.replace(file.with_suffix(".old")) for file in path.files]
    about = path.about
    if control == "forward":
        nodes = [old[0], *old[-2:0:-1], old[-1]]
    else:
        nodes, teacher, degraded = [], load_file(old[0]), load_file(old[-1])
        for node in range(last + 1):
            nodes.append(folder / f"{node}.new")
            files.save_tensors(nodes[-1], {name: torch.lerp(teacher[name], degraded[name],
                                                              node / last) for name in teacher})
    ends = [about["positions"][0], about["positions"][-1]]  # those between are no longer known
    disback.DegradationPath.create(folder, nodes, **about | {"positions": ends, "control": control})


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


# ------------------------------------------------------------------------------------ the study


def study(grid: Grid, file: Path, jobs: int, skip_corrupt: bool = False) -> dict[tuple, dict]:
    """Run what the lines lack of the grid: first what needs no tuning, then what did."""
    with appending(file) as append:
        lines = read(file, skip_corrupt)
        check(grid, lines, file)
        for cell in grid.arms:  # trains each teacher, once
            flags = CELLS[cell] | dict(grid.flags)
            problem.make(dataclasses.replace(problem.PRESETS[flags["data"]], **flags))
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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("study.py", description=__doc__, allow_abbrev=False)
    parser.error = command.refuse
    parser.add_argument("--quick", action="store_true", help="a small grid of some minutes")
    parser.add_argument("--out", type=command.path, help="folder of lines.jsonl and the figures "
                        "(default: toy2d/study, or runs/study of a quick one)")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these: " + " ".join(CELLS))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these: " + " ".join(ARMS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--figures-only", action="store_true", help="draw the lines that are there")
    parser.add_argument("--skip-corrupt", action="store_true", help="go on past corrupt lines")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        command.refuse(f"--jobs must be at least 1, not {args.jobs}")
    whole = QUICK if args.quick else FULL
    grid = select(whole, args.cells, args.arms)
    file = (args.out or (Path("runs/study") if args.quick else FOLDER)) / "lines.jsonl"
    if args.figures_only and not file.exists():
        raise disback.Refusal(f"{file} does not exist: run the study first")
    if not args.figures_only:
        study(grid, file, args.jobs, args.skip_corrupt)
    study_figures.draw(file.parent, whole, read(file, args.skip_corrupt))


if __name__ == "__main__":
    command.run(main)
