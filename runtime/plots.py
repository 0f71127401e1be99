"""What the figures of all problems have in common: colours, a run's snapshots, its convergence."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor, nn
from tqdm import trange

from disback import DegradationPath
from runtime import files, ranks
from runtime.records import read_log, read_snapshots

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a screen)
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

DATA, TARGET, STUDENT, OTHER = "#b8b8b8", "#d95f02", "#1f5fa8", "#7a3fa0"


def draw_convergence(file: Path, out: Path, compare: Path | None, metric: str, label: str,
                     floor: float, floors_name: str) -> None:
    """A metric of log.jsonl and the mismatch degree against network evaluations, those of stage 1
    before them; `floor` is the least that the metric can reach."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    for run, color in ((out, STUDENT), (compare, OTHER)):
        if run is None:
            continue
        lines = read_log(run)
        metrics = files.load_json(run / "metrics.json", "finish that run first")
        stage1 = metrics["network_evals"]["stage1"]
        at = [(stage1 + line.get("network_evals", math.nan)) / 1e6 for line in lines]
        name = {"disback": "DisBack", "vsd": "VSD"}[metrics["method"]]
        name += f" (stage 1: {stage1 / 1e6:.2f} M)" if stage1 else ""
        top.plot(at, [line.get(metric, math.nan) for line in lines], color=color, label=name)
        bottom.plot(at, [line.get("mismatch", math.nan) for line in lines], color=color, label=name)
        if stage1:
            for axis in (top, bottom):
                axis.axvspan(0, stage1 / 1e6, color=color, alpha=0.12, linewidth=0)
        evals_a_step = metrics["network_evals"]["stage2"] / metrics["steps"]
        for step, _ in switches(read_snapshots(run)):
            for axis in (top, bottom):
                axis.axvline((stage1 + evals_a_step * step) / 1e6, color=color, linewidth=0.8,
                             linestyle=":")
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
    files.atomically(file, lambda beside: figure.savefig(beside, dpi=110, format="png"))
    plt.close(figure)
