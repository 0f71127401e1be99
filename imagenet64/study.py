"""When does backtracking pay on images? Two starts, two arms: python -m imagenet64.study

As toy2d/study.py, on preset tiny. A run goes through degrade.main and backtrack.main and leaves
one JSON line in lines.jsonl, from which alone the figure is drawn; a study that was stopped goes
on. An arm gets the learning rate whose final Fréchet distance is least on the tuning seed, of the
same for both arms, and is judged on other seeds. Both arms of a start have the same budget of
network evaluations: what stage 1 takes, stage 2 lacks.
"""

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import backtrack
import degrade
import disback
from runtime import command, files
from runtime.plots import DATA, OTHER, STUDENT, plt, read_snapshots, readable, save
from runtime.study import appending, first_reach, quiet, words

FILE = Path(__file__).parent / "study" / "lines.jsonl"
FIGURE = Path(__file__).parent / "images" / "study.png"
HALVES = 5.06  # the mean distance of random halves of the digits, see README.md
STARTS = {"teacher": "The student starts as the teacher's copy",
          "untrained": "The student starts untrained"}
ARMS = {"VSD": {"target": "teacher"}, "DisBack": {}}  # flags of stage 2
COLORS = {"VSD": OTHER, "DisBack": STUDENT}
# A quarter of the preset's batch: by trying, iterations are what counts here, not their images.
BOTH = {"batch": 32}  # flags of both stages
# From an untrained student stage 1 at 1e-3 is at its end in two steps, and shows no way there.
STAGE1 = {"teacher": {}, "untrained": {"lr_degrade": 1e-4}}
BUDGET = {"teacher": 240, "untrained": 250}  # in iterations of VSD
LEVELS = {"teacher": (20, 7.6, HALVES), "untrained": (200, 100)}  # distances to be reached
# Of student and fake alike: what both arms of a start may choose.
RATES = {"teacher": (1e-4, 3e-4, 1e-3), "untrained": (3e-4, 1e-3, 3e-3)}
TUNING, SEEDS = (100,), (0, 1, 2)
POINTS = 8  # of a judged run's curve
Run = tuple[str, str, int, float | None]  # start, arm, seed, rate
Lines = dict[Run, dict]


def runs(lines: Lines) -> list[Run]:
    """All runs, the tuning first; rate None where that is unfinished."""
    arms = [(start, arm) for start in STARTS for arm in ARMS]
    return [(*arm, seed, rate) for arm in arms for rate in RATES[arm[0]] for seed in TUNING] + [
        (*arm, seed, chosen(lines, *arm)) for seed in SEEDS for arm in arms]


def chosen(lines: Lines, start: str, arm: str) -> float | None:
    """The rate with the least median final distance on the tuning seeds, which are all that it
    reads; None before all of those runs are there."""
    ends = {rate: [lines.get((start, arm, seed, rate)) for seed in TUNING]
            for rate in RATES[start]}
    if any(None in found for found in ends.values()):
        return None
    return min(ends, key=lambda rate: median(map(distance, ends[rate])))


def distance(line: dict) -> float:
    """The final Fréchet distance; infinite for a run that diverged."""
    return math.inf if "failed" in line else line["final"]["frechet"]


def execute(run: Run) -> dict:
    """Both stages of a run in a folder that does not stay; its line."""
    (start, arm, seed, rate), began, stage1 = run, time.perf_counter(), 0
    flags = {"seed": seed, "start": start, **BOTH}
    with tempfile.TemporaryDirectory() as out, quiet():
        if arm == "DisBack":
            degrade.main(["imagenet64", "--out", out, *words(flags | STAGE1[start])])
            stage1 = disback.DegradationPath(Path(out, "path")).about["network_evals"]
        steps = BUDGET[start] - math.ceil(stage1 / (8 * BOTH["batch"]))  # 8 an image and iteration
        every = BUDGET[start] // POINTS if seed in SEEDS else steps  # of a tuning run only the end
        flags |= {"steps": steps, "save_every": steps, "log_every": every}
        ending = distil(Path(out), flags | ARMS[arm] | {"lr_student": rate, "lr_fake": rate})
        log = Path(out, "log.jsonl")
        rows = [json.loads(row) for row in log.read_text().splitlines()] if log.exists() else []
    return {"start": start, "arm": arm, "seed": seed, "rate": rate, "settings": settings(start),
            "torch": torch.__version__, "stage1": stage1, "steps": steps,
            "evals": [stage1 + row["network_evals"] for row in rows],
            "frechet": [round(row["frechet"], 3) for row in rows],
            "seconds": round(time.perf_counter() - began, 1), **ending}


def distil(out: Path, flags: dict) -> dict:
    """Stage 2, and how it ended, a divergence being an end as well. "spread" is the deviation of
    a pixel over images of one label: next to none where the student draws one image a label."""
    try:
        args, problem, path = backtrack.prepare(["imagenet64", "--out", str(out), *words(flags)])
        no_figures = dataclasses.replace(problem, draw=lambda *_: None)
        backtrack.distil(args, no_figures, path)
    except disback.Refusal as refusal:
        if "try lower learning rates" not in str(refusal):
            raise
        return {"failed": str(refusal).split(";")[0]}
    metrics = files.load_json(out / "metrics.json", "")
    labelled = read_snapshots(out)[-1][1]["x0"].unflatten(0, (4, 10))  # ten labels, four times
    return {"final": {"spread": labelled.std(dim=0).mean().item(),
                      **{name: metrics[name] for name in ("frechet", "accuracy", "node")}}}


def settings(start: str) -> str:
    """All of a run's flags but its start, seed, rates and steps, and the budget."""
    return f"both {words(BOTH)}, stage 1 {words(STAGE1[start])}, budget {BUDGET[start]}"


def read(file: Path) -> Lines:
    """The lines by run. Refuses by its number a line that is corrupt, of other settings, or of a
    run that was there before."""
    lines = {}
    for number, text in enumerate(file.read_bytes().splitlines(True) if file.exists() else (), 1):
        with files.blame(f"{file}, line {number}, is of no use: remove it to repeat its run"):
            line = json.loads(text)
            run = line["start"], line["arm"], line["seed"], line["rate"]
            assert text.endswith(b"\n"), "it was cut off"
            assert line["settings"] == settings(line["start"]), "it is of other settings"
            assert distance(line) >= 0 and run not in lines, f"it repeats {run}"
        lines[run] = line
    return lines


def study(file: Path) -> None:
    """Run what the lines lack, one run at a time."""
    with appending(file) as append:
        lines = read(file)
        while todo := [run for run in runs(lines) if run[3] and run not in lines]:
            print(f"{len(lines)} runs done, now {todo[0]}", flush=True)
            lines[todo[0]] = execute(todo[0])
            append(lines[todo[0]])


def judged(lines: Lines, start: str, arm: str) -> list[dict]:
    """The lines of the judging seeds at the arm's rate."""
    found = [lines.get((start, arm, seed, chosen(lines, start, arm))) for seed in SEEDS]
    return [line for line in found if line]


def report(lines: Lines, start: str, arm: str) -> str:
    """Medians and ranges over the seeds: of the final numbers, and of the millions of evaluations
    until each of the start's levels."""
    found = judged(lines, start, arm)
    numbers = {"final": [distance(line) for line in found]}
    for level in LEVELS[start]:
        numbers[f"to {level:g}"] = [first_reach(line["evals"], line["frechet"], level) / 1e6
                                    for line in found]
    for name in ("accuracy", "spread"):
        numbers[name] = [line["final"][name] for line in found if "final" in line]
    texts = [f"{name} {median(of):.3g} ({min(of):.3g} to {max(of):.3g})"
             for name, of in numbers.items() if of]
    return f"{start}, {arm}, rate {chosen(lines, start, arm)}: " + "; ".join(texts)


def draw(lines: Lines, file: Path) -> None:
    """A panel a start: over evaluations the distance of every judging seed, and their median."""
    figure, axes = plt.subplots(1, len(STARTS), figsize=(11, 4.6), layout="constrained",
                                squeeze=False)
    for axis, start in zip(axes[0], STARTS):
        for arm, color in COLORS.items():
            found = judged(lines, start, arm)
            for line in found:
                axis.plot([at / 1e6 for at in line["evals"]], line["frechet"], color=color,
                          linewidth=0.8, alpha=0.6)
            if found:  # a run that diverged lacks points: a median is drawn where all have one
                middle = [median(values) for values in zip(*(line["frechet"] for line in found))]
                axis.plot([at / 1e6 for at in found[0]["evals"][:len(middle)]], middle, color=color,
                          linewidth=2.5, label=f"{arm}, learning rate {found[0]['rate']:g}")
                axis.axvspan(0, found[0]["stage1"] / 1e6, color=color, alpha=0.12, linewidth=0)
                axis.legend(fontsize=9)
        axis.axhline(HALVES, color=DATA)
        axis.text(0.01, HALVES, f"two halves of the data: {HALVES}", color="#808080", fontsize=8,
                  transform=axis.get_yaxis_transform(), va="bottom")
        axis.set(xlim=(0, None), yscale="log", title=STARTS[start],
                 xlabel="network evaluations, millions (stage 1 included)")
        readable(axis)
    axes[0, 0].set_ylabel("Fréchet distance of the student's digits to the data")
    figure.suptitle(f"DisBack and VSD with the same budget: each of {len(SEEDS)} seeds (thin) and "
                    "their median (thick); shaded: stage 1; lower is better")
    save(figure, file)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("study.py", description=__doc__, allow_abbrev=False)
    parser.error = command.refuse
    parser.add_argument("--figures-only", action="store_true", help="draw the lines that are there")
    if not parser.parse_args(argv).figures_only:
        study(FILE)
    elif not FILE.exists():
        raise disback.Refusal(f"{FILE} does not exist: run the study first")
    lines = read(FILE)
    for start in STARTS:
        print(*(report(lines, start, arm) for arm in ARMS), sep="\n")
    draw(lines, FIGURE)


if __name__ == "__main__":
    command.run(main)
