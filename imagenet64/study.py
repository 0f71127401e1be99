"""When does backtracking pay on images? python -m imagenet64.study

As toy2d/study.py, on preset tiny, whose student starts as the teacher's copy: with and without the
path, with one update of the fake for one of the student or two, at rates from far too low to too
high. All have one budget: what stage 1 and more updates of the fake take, iterations lack.
"""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import backtrack
import degrade
import disback
from imagenet64 import digits
from imagenet64.problem import PRESETS, load_teacher
from runtime import command, files
from runtime.interface import Problem
from runtime.plots import DATA, OTHER, STUDENT, plt, readable, save
from runtime.study import Lines, Rates, Study, median_interval, of, quiet, rates_of, words

FOLDER = Path(__file__).parent / "study"
BUDGET = 80  # iterations of plain VSD
POINTS, SAMPLES = 3, 400  # times at which student and fake are looked at, and images then
CELLS = {"digits": {"both": {"batch": 16}, "stage1": {"steps": 20, "nodes": 4, "lr_degrade": 1e-3},
                    "stage2": {"interval": 4, "ema": 0.9}}}
ARMS = {"vsd": {"target": "teacher"}, "disback": {},  # flags of stage 2
        "vsd k2": {"target": "teacher", "fake_updates": 2}, "disback k2": {"fake_updates": 2}}
COLORS = {"vsd": OTHER, "disback": STUDENT, "vsd k2": OTHER, "disback k2": STUDENT}
RATES = tuple((rate, rate) for rate in (2e-5, 1e-4, 5e-4, 2.5e-3))  # of student and fake
SEEDS = tuple(range(5))
PLAN = [(("digits",), tuple(ARMS), RATES, SEEDS)]
QUICK = [(("digits",), ("vsd", "disback"), RATES[1:2], SEEDS[:1])]
LABELS = {"frechet": "Fréchet distance to the data", "spread": "spread ÷ the data's",
          "bias": "fake's bias"}
LEVELS = 0.09, 0.3, 1.0  # sigma: the lognormal's median, and a standard deviation to either side
HALVES = 5.06  # the mean distance of random halves of the digits, see README.md


def prepare() -> None:
    """The teacher into the cache: its training takes minutes, and shows them here alone."""
    load_teacher(PRESETS["tiny"])


def advance(cell: str, arm: str, seed: int, rates: tuple[Rates, ...]) -> dict:
    """A path for all rates, and a run at each of them, through the stages themselves."""
    flags, stage1 = CELLS[cell], 0
    both, path = {"seed": seed} | flags["both"], {}
    with tempfile.TemporaryDirectory() as out, quiet():
        if ARMS[arm].get("target") != "teacher":
            degrade.main(["imagenet64", "--out", out, *words(both | flags["stage1"])])
            path = {"path": Path(out, "path")}
            stage1 = disback.DegradationPath(path["path"]).about["network_evals"]
        batch, k = flags["both"]["batch"], ARMS[arm].get("fake_updates", 1)
        steps = (8 * batch * BUDGET - stage1) // (batch * (4 + 4 * k))
        later = both | flags["stage2"] | ARMS[arm] | path | {
            "steps": steps, "save_every": steps, "log_every": steps // POINTS}
        found = [distil(Path(out, str(i)), later | {"lr_student": student, "lr_fake": fake})
                 for i, (student, fake) in enumerate(rates)]
    final = {name: [one.pop(name) for one in found] for name in ("frechet", "accuracy")}
    return {"steps": steps, "stage1": stage1 / (8 * batch * BUDGET), "final": final,
            **{name: [one[name] for one in found] for name in found[0]}}


def distil(out: Path, flags: dict) -> dict:
    """Stage 2; a divergence is an end as well. The distance takes seconds: it is measured once."""
    args, problem, path = backtrack.prepare(["imagenet64", "--out", str(out), *words(flags)])
    watched = dataclasses.replace(problem, evaluate=lambda student: {}, draw=lambda *_: None,
                                  diagnose=Diagnosis(problem))
    try:
        backtrack.distil(args, watched, path)
    except disback.Refusal as refusal:
        if "try lower learning rates" not in str(refusal):
            raise
        return {**dict.fromkeys(("frechet", "accuracy"), math.nan),
                **dict.fromkeys(("spread", "bias"), [math.nan] * POINTS)}
    files.load_net(out / "student.safetensors", problem.student)
    rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()][:POINTS]
    return {**problem.evaluate(problem.student),
            **{name: [row[name] for row in rows] for name in ("spread", "bias")}}


class Diagnosis:
    """diagnosis(student, fake) -> what toy2d/diagnosis.py measures, of images of the student
    itself, as many of each label, from fixed random numbers.

    spread: the deviation of a pixel over images of one label, over the data's. bias: per pixel, of
    E[D(x0 + sigma eps) - x0], over sigma + 0.5, the mean over LEVELS. But for chance, about 0.01,
    it is 0 for the exact denoiser of the samples."""

    def __init__(self, problem: Problem):
        self.generate = problem.generate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.z, _ = problem.sample_inputs(SAMPLES)
            self.eps = torch.randn_like(self.z)
        self.cond = problem.snapshot()[1][:10].repeat(SAMPLES // 10, 1)  # the labels in order
        images, classes = digits.load()
        self.of_data = deviation([images[classes == label] for label in range(10)])

    @torch.no_grad()
    def __call__(self, student: nn.Module, fake: nn.Module) -> dict[str, float]:
        x0 = self.generate(student, self.z, self.cond)
        bias = 0.0
        for level in LEVELS:
            sigma = torch.tensor(level)
            error = (fake(x0 + sigma * self.eps, sigma, self.cond) - x0).mean(dim=0)
            bias += error.square().mean().sqrt().item() / (level + 0.5) / len(LEVELS)
        spread = deviation(x0.unflatten(0, (-1, 10)).unbind(dim=1)) / self.of_data
        return {"spread": spread, "bias": bias}


def deviation(by_label: list[Tensor]) -> float:
    """Root mean square over labels and pixels of a pixel's deviation."""
    variances = [images.var(dim=0).mean().item() for images in by_label]
    return math.sqrt(sum(variances) / len(variances))


def number(run: dict, name: str) -> float:
    """A run's final distance, last spread or mean bias; infinite for one that diverged."""
    found = [run["final"]["frechet"]] if name == "frechet" else run[name]
    if None in found:
        return math.inf
    return found[-1] if name == "spread" else float(np.mean(found))


def summary(lines: Lines) -> list[dict]:
    """Of every arm and rate the medians, least and most of the seeds; and the distance over plain
    VSD's at the same rate and k, paired by seed: its median, and the interval of that."""
    rows = []
    for arm, vsd in zip(ARMS, ("vsd", "vsd", "vsd k2", "vsd k2")):
        for rates in rates_of(lines, "digits", arm):
            runs, theirs = (of(lines, "digits", name, rates) for name in (arm, vsd))
            ratios = [number(runs[seed], "frechet") / number(theirs[seed], "frechet")
                      for seed in runs.keys() & theirs]
            row = {"arm": arm, "rate": rates[0], "runs": len(runs)}
            for name in LABELS:
                values = [number(run, name) for run in runs.values()]
                row[name] = [float(np.median(values)), min(values), max(values)]
            rows.append(row | {"ratio": median_interval(ratios) if ratios else None})
    return rows


def draw(out: Path, lines: Lines) -> None:
    """study.png, over the rate every seed and the medians; and summary.json."""
    text = json.dumps(summary(lines)).replace("Infinity", '"never"').replace("{", "\n{")
    files.atomically(out / "summary.json", lambda file: file.write_text(text + "\n"))
    figure, axes = plt.subplots(3, 2, sharex=True, sharey="row", figsize=(8, 9),
                                layout="constrained")
    for row, (name, label) in zip(axes, LABELS.items()):
        row[0].set_ylabel(label)
        for axis, arms in zip(row, (("vsd", "disback"), ("vsd k2", "disback k2"))):
            for arm in arms:
                draw_arm(axis, lines, arm, name)
            axis.grid(alpha=0.25)
    for column, k in zip(axes.T, ("one update", "two updates")):
        column[0].set(title=f"{k} of the fake per iteration", xscale="log", yscale="log")
        column[0].axhline(HALVES, color=DATA, label="two halves of the data")
        readable(column[0])
        column[-1].set_xticks([rate for rate, _ in RATES], [f"{rate:g}" for rate, _ in RATES])
        column[-1].minorticks_off()
        column[-1].set_xlabel("learning rate of student and fake")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(figure, out / "study.png")


def draw_arm(axis: plt.Axes, lines: Lines, arm: str, name: str) -> None:
    """Every seed as a point, and a line through the medians."""
    found = {rates[0]: [number(run, name) for run in of(lines, "digits", arm, rates).values()]
             for rates in rates_of(lines, "digits", arm)}
    for rate, values in found.items():
        axis.plot([rate] * len(values), values, "o", color=COLORS[arm], markersize=3, alpha=0.5)
    axis.plot(list(found), [np.median(values) for values in found.values()], color=COLORS[arm],
              label={"vsd": "VSD", "disback": "DisBack"}[arm.split()[0]])


STUDY = Study(__doc__, FOLDER, CELLS, ARMS, PLAN, QUICK,
              ("frechet", "accuracy", "spread", "bias"), advance, draw, prepare=prepare)

if __name__ == "__main__":
    command.run(STUDY.main)
