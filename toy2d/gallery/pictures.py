"""gallery.png: samples of every method."""

import importlib
from pathlib import Path

import torch

from runtime.plots import DATA, STUDENT, TARGET, plt, save
from toy2d import mixture
from toy2d.gallery.analogues import acceptance, cloud, examples, fields, signal

HEADING = """Seed 0.  Grey: data.  Blue: samples of the student.  Orange: the same, backtracked.
In brackets: where the student starts (off: untrained, far from the data; copy: as the teacher)
and where the teacher is asked (S: at noised samples of the student; P: at the student's guess
of a trajectory; X: at noised data; J: on the teacher's own trajectories)"""


def draw(out: Path, rows: dict, methods: tuple[str, ...]) -> None:
    """Samples of every method of the plane with seed 0, and a plot for each of the others."""
    figure = plt.figure(figsize=(9, 12.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 1.05))
    above.suptitle(HEADING, fontsize=9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        points = mixture.ring().sample(1500)
    analogues = {"hipa": signal, "distillspec": acceptance, "pvd": fields, "stepbystep": examples}
    for axis, method in zip((*above.subplots(5, 3).flat, *below.subplots(1, 4).flat), methods):
        module = importlib.import_module(f"toy2d.gallery.{method}")
        axis.tick_params(labelsize=7)
        if (method, "", False, 1) not in rows:
            axis.set_axis_off()
        elif method in analogues:
            axis.set_title(f"{module.NAME}:\n{analogues[method].__doc__}", fontsize=8)
            analogues[method](axis, out, rows)
        else:
            axis.set_title(f"{module.NAME}  ({module.START}; {module.QUERIES})", fontsize=9)
            clouds(axis, out, rows, method, points, module.BACKTRACK)
    save(figure, out / "gallery.png")


def clouds(axis: plt.Axes, out: Path, rows: dict, method: str, points: torch.Tensor,
           walks: bool) -> None:
    axis.set(xlim=(-3.3, 9.9), ylim=(-4.3, 3.3), xticks=[], yticks=[], aspect="equal")
    for left, back, color in ((0.0, False, STUDENT), (6.6, True, TARGET)):
        lines = rows.get((method, "", back, 1), [{"seed": None}])
        if lines[0]["seed"] == 0:
            (kept,) = cloud(out, f"{method}{back * '-backtrack'}", 2, "x")
            for x, paint, size in ((points, DATA, 1), (kept, color, 0.8)):
                axis.plot(x[:, 0] + left, x[:, 1], ".", color=paint, markersize=size)
            axis.text(left, -4, f"SWD {lines[0]['swd']:.2f}", fontsize=8, ha="center")
        else:
            axis.text(left, 0, "not defined" if back and not walks else "not run", fontsize=8,
                      ha="center", color="#808080")
