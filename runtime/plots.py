"""What the figures of all problems have in common: colours, a run's snapshots, its convergence."""

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from tqdm import trange

from disback import DegradationPath
from runtime import files, ranks
from runtime.records import read_log, read_snapshots

METHODS = {"disback": "DisBack", "vsd": "VSD"}
OTHER_FAKES = {("disback", "teacher"): ", fake from the teacher",
               ("vsd", "degraded"): ", degraded fake"}
DATA, TARGET, STUDENT, OTHER = "#b8b8b8", "#d95f02", "#1f5fa8", "#7a3fa0"


def names(runs: list[Path]) -> list[str]:
    """What finished runs are called in a figure: by their method and the fake's first weights where
    those are not its own, and by their folders where that does not tell them apart."""
    found = []
    for run in runs:
        metrics = files.load_json(run / "metrics.json", "finish that run")
        found.append(METHODS[metrics["method"]]
                     + OTHER_FAKES.get((metrics["method"], metrics.get("fake_init")), ""))
    if len({*found}) < len(found):
        places = [run.resolve() for run in runs]
        above = os.path.commonpath(places)
        found = [f"{name} ({'/'.join(place.relative_to(above).parts) or place.name})"
                 for name, place in zip(found, places)]
    return found


def curves(axes: dict[str, plt.Axes], runs: list[Path], in_steps: bool = False) -> None:
    """Columns of log.jsonl, each on its axis, of finished runs: against steps, or against millions
    of network evaluations, those of stage 1, shaded, before them. Dotted: the target switched."""
    for run, name, color in zip(runs, names(runs), (STUDENT, OTHER)):
        lines, metrics = read_log(run), files.load_json(run / "metrics.json", "finish that run")
        evals = metrics["network_evals"]
        start, scale = (0, 1) if in_steps else (
            evals["stage1"] / 1e6, evals["stage2"] / 1e6 / metrics["steps"])
        for column, axis in axes.items():
            axis.plot([start + scale * line["step"] for line in lines],
                      [line.get(column, math.nan) for line in lines], ".-", color=color,
                      markersize=4, label=name)
            for step, _ in switches(read_snapshots(run)):
                axis.axvline(start + scale * step, color=color, linewidth=0.8, linestyle=":")
            if start:
                axis.axvspan(0, start, color=color, alpha=0.12, linewidth=0)


def draw_convergence(file: Path, runs: list[Path], metric: str, label: str, floor: float,
                     floors_name: str) -> None:
    """A metric and the mismatch degree; `floor` is the least that the metric can reach."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    curves({metric: top, "mismatch": bottom}, runs)
    top.set(yscale="log", ylabel=label,
            title="Convergence (shaded: stage 1; dotted: the target has switched)")
    top.axhline(floor, color=DATA, linewidth=1)
    top.text(0.995, floor * 1.04, floors_name, color="#808080", fontsize=8, ha="right",
             transform=top.get_yaxis_transform())
    bottom.set(yscale="log", ylabel="mismatch degree", xlabel="network evaluations, millions")
    for axis in (top, bottom):
        readable(axis)
    top.legend()
    save(figure, file)


def of_nodes(path: DegradationPath | None, net: nn.Module, sample: Callable) -> list[Any]:
    """sample(net) with the weights of every node, teacher first; without a path of the teacher,
    whose weights `net` then has. It shows progress, as figures take longest here."""
    found = []
    for node in trange(len(path) if path else 1, desc="figures: samples of the nodes",
                       disable=ranks.rank() > 0):
        if path:
            path.load(node, net)
        found.append(sample(net))
    return found


def switches(snapshots: list[tuple[int, dict[str, Tensor]]]) -> list:
    """The snapshots at which the target had just moved to another node."""
    return [after for before, after in zip(snapshots, snapshots[1:])
            if after[1]["node"] != before[1]["node"]]


def readable(axis: plt.Axes) -> None:
    """Plain numbers on a logarithmic y axis."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)


def save(figure: plt.Figure, file: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks, in a prompt
        files.atomically(file, lambda beside: figure.savefig(beside, dpi=110, format="png"))
    plt.close(figure)
