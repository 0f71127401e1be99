"""The figures of a run, drawn from its folder alone; README.md beside this file explains them."""

import functools
import textwrap
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor, nn

import disback
from runtime import files
from runtime.plots import (
    DATA,
    STUDENT,
    TARGET,
    curves,
    draw_convergence,
    names,
    of_nodes,
    plt,
    save,
    switches,
)
from runtime.records import read_snapshots
from toy2d import trajectory
from toy2d.diagnosis import EARLY, Diagnosis, answers, frame
from toy2d.metrics import Evaluation
from toy2d.mixture import Mixture


@torch.no_grad()
def draw(out: Path, path: disback.DegradationPath | None, compare: Path | None, net: nn.Module,
         sample: callable, data: Mixture, diagnosis: Diagnosis) -> None:
    """Write all figures to `out`/figures; `compare` is another run's folder, or None.

    `net` is a denoiser that the nodes are loaded into; sample(net, n) draws n points from it.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    snapshots = read_snapshots(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nodes = of_nodes(path, net, lambda net: sample(functools.partial(answers, net),
                                                       1000)[:, :2])
        points = data.sample(1000)[:, :2]
        evaluate = Evaluation(data)
        floors = [evaluate.of(data.sample(evaluate.samples))["swd"] for _ in range(20)]
        draw_mismatch(folder / "mismatch.png", path, net, snapshots[0][1]["x0"], data)
    runs = [out, compare] if compare else [out]
    clouds = [kept["student"] for run in runs for _, kept in read_snapshots(run)] + nodes
    inner = [x.quantile(torch.tensor([0.005, 0.995]), dim=0) for x in clouds]
    limits = frame(torch.cat([points, *inner]))  # a sample astray would make the data a dot
    draw_path(folder / "path.png", nodes, snapshots, points, limits)
    draw_convergence(folder / "convergence.png", runs, "swd", "SWD of the student to the data",
                     sum(floors) / 20, "two sets of data")
    draw_mechanism(folder / "mechanism.png", runs, data)
    draw_gif(folder / "backtracking.gif", runs, nodes, points, limits)
    trajectory.write(folder / "trajectory.html", out, snapshots, nodes, points, diagnosis.grid(),
                     limits)


def draw_mismatch(file: Path, path: disback.DegradationPath | None, net: nn.Module, x0: Tensor,
                  data: Mixture) -> None:
    """What a network answers at the student's first samples, what would be right, and the error.

    For the teacher the right answer is the data's score, for the degraded node the score of the
    student's own samples; both are exact. Arrows are those of the plane."""
    last = len(path) - 1 if path else 0
    rows = [(node, sigma) for node in sorted({0, last}) for sigma in (0.2, 5.0)]
    figure, axes = plt.subplots(len(rows), 3, figsize=(9.6, 3.1 * len(rows)), layout="constrained",
                                squeeze=False)
    for (node, sigma), row in zip(rows, axes):
        x = x0[:60] + sigma * torch.randn_like(x0[:60])
        exact = (Mixture.of_samples(x0) if node else data).score(x, sigma)
        answer, teachers = (score_of_node(path, i, net, x, sigma) for i in (node, 0))
        size = f"the error, {in_words(relative_error(answer, exact))}"
        if node:
            size += f"\n(the teacher's, {in_words(relative_error(teachers, exact))})"
        asked = f"degraded node {node}" if node else "teacher"
        right = "the student's samples" if node else "the data"
        longest = torch.cat([answer, exact])[:, :2].norm(dim=1).max().item()
        span = (x[:, :2].amax(dim=0) - x[:, :2].amin(dim=0)).max().item()
        for axis, arrows, title, color in (
                (row[0], answer, f"{asked}: its score", TARGET),
                (row[1], exact, f"exact score of {right}", STUDENT),
                (row[2], answer - exact, size, "#c02020")):
            draw_arrows(axis, x[:, :2], arrows[:, :2] * (0.3 * span / longest), title, color)
        row[0].set_ylabel(f"$\\sigma$ = {sigma:g}", fontsize=11)
    all_of = f", in all {x.shape[1]} dimensions (two are drawn)" if x.shape[1] > 2 else ""
    figure.suptitle("The score at the student's first samples (grey: the samples, noised).\n"
                    f"On the right its error, and how long that is beside the exact score{all_of}",
                    fontsize=11)
    save(figure, file)


def draw_arrows(axis: plt.Axes, x: Tensor, arrows: Tensor, title: str, color: str) -> None:
    """Arrows at points x [n, 2] of the plane, all of each in sight."""
    axis.plot(*x.T, ".", color=DATA, markersize=3)
    axis.quiver(*x.T, *arrows.T, color=color, angles="xy", scale_units="xy", scale=1, width=0.006)
    axis.update_datalim((x + arrows).numpy())  # a quiver alone would clip its arrows
    axis.set_title(title, fontsize=9)
    axis.margins(0.05)
    axis.autoscale_view()
    axis.set_aspect("equal", adjustable="datalim")


def in_words(error: float) -> str:
    """A relative error, for a title."""
    return f"{error:.0%} as long" if error < 1 else f"{error:,.1f} times as long"


def score_of_node(path: disback.DegradationPath | None, node: int, net: nn.Module, x: Tensor,
                  sigma: float) -> Tensor:
    """The score at x [n, d] of a node, which is loaded into net."""
    if path:
        path.load(node, net)
    return (answers(net, x, torch.full((len(x), 1), sigma)) - x) / sigma**2


def relative_error(answer: Tensor, exact: Tensor) -> float:
    """Mean length of the difference over mean length of the exact vectors."""
    return ((answer - exact).norm(dim=1).mean() / exact.norm(dim=1).mean()).item()


def draw_path(file: Path, nodes: list[Tensor], snapshots: list, points: Tensor,
              limits: tuple) -> None:
    """Samples of every node, teacher first; below them the student after every switch."""
    switched = [snapshots[0], *switches(snapshots), snapshots[-1]]
    last = len(nodes) - 1
    names = {last: f"node {last}: degraded", 0: "node 0: the teacher"}
    there = [(x, names.get(i, f"node {i}"), TARGET) for i, x in enumerate(nodes)]
    back = [(kept["student"], f"iteration {step}:\nto node {int(kept['node'])}", STUDENT)
            for step, kept in switched]
    back[-1] = (*back[-1][:1], f"iteration {snapshots[-1][0]}:\nthe end", STUDENT)
    columns = min(6, max(len(there), len(back)))
    rows = [-(-len(part) // columns) for part in (there, back)]
    figure, axes = plt.subplots(sum(rows), columns, figsize=(2 * columns, 2.2 * sum(rows)),
                                layout="constrained", sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for part, first_row in ((there, 0), (back, rows[0])):
        for axis, (x, title, color) in zip(axes[first_row:].flat, part):
            axis.set_axis_on()
            axis.plot(*points.T, ".", color=DATA, markersize=1)
            axis.plot(*x.T, ".", color=color, markersize=1)
            axis.set_title(title, fontsize=9)
            axis.set(xlim=limits, ylim=limits, xticks=[], yticks=[], aspect="equal")
    said = ("Orange: samples of each node, the path on which the teacher degrades.   "
            "Blue: the student on the way back.   Grey: data")
    figure.suptitle(textwrap.fill(said, 22 * columns), fontsize=11)  # 22 letters fill a column
    save(figure, file)


def draw_mechanism(file: Path, runs: list[Path], data: Mixture) -> None:
    """The numbers of a Diagnosis over the iterations, of this run and another's."""
    mean = data.weights @ data.means
    spread = (data.weights @ (data.stds**2 + (data.means - mean) ** 2))[:2].mean().sqrt().item()
    panels = {"data_distance": "the student's mean: distance from the data's",
              "spread": "the spread of its samples, a standard deviation",
              "fake_bias": "the fake's bias at the student's samples",
              "teacher_error": "the teacher's error at the student's samples"}
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6), sharex=True, layout="constrained")
    curves(dict(zip(panels, axes.flat)), runs, in_steps=True)
    for axis, title in zip(axes.flat, panels.values()):
        axis.set_title(title, fontsize=10)
    axes[0, 1].axhline(spread, color=DATA)
    axes[0, 1].text(0.01, spread, "the data's", color="#808080", fontsize=8, va="bottom",
                    transform=axes[0, 1].get_yaxis_transform())
    for axis in axes.flat:
        axis.set(xscale="log", xlim=(4, None), ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.axvspan(4, EARLY, color=DATA, alpha=0.12, linewidth=0)
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 1].set_ylim(0, max(axes[0, 1].get_ylim()[1], 1.2 * spread))  # its name is above it
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    axes[0, 0].legend()
    figure.suptitle(f"Student, fake and teacher (dotted: the target has switched; grey: the first "
                    f"{EARLY} iterations)")
    save(figure, file)


def draw_gif(file: Path, runs: list[Path], nodes: list[Tensor], points: Tensor,
             limits: tuple) -> None:
    """The student's samples on their way through the targets to the data, a panel for each run."""
    figure, axes = plt.subplots(1, len(runs), figsize=(3.9 * len(runs), 4.2), dpi=80,
                                layout="constrained", squeeze=False)
    style = dict(marker=".", linestyle="", markersize=2.5)
    panels = []
    for run, method, axis in zip(runs, names(runs), axes.flat):
        axis.set(xlim=limits, ylim=limits, xticks=[], yticks=[], aspect="equal",
                 title=heading(method, 1000, 0))
        axis.plot(*points.T, color=DATA, label="data", **style)
        (target,) = axis.plot([], [], color=TARGET, label="target", **style)
        (student,) = axis.plot([], [], color=STUDENT, label="student", **style)
        known = nodes if run == runs[0] else nodes[:1]  # of the other only the teacher is here
        panels.append((dict(read_snapshots(run)), known, axis, target, student, method))
    axes[0, 0].legend(loc="lower right", markerscale=3)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # laid out once: again for every picture takes longest

    def show(now: int) -> None:
        for snapshots, known, axis, target, student, method in panels:
            kept = snapshots[max([step for step in snapshots if step <= now] or [min(snapshots)])]
            node = int(kept["node"])
            target.set_data(*known[node].T if node < len(known) else ([], []))
            student.set_data(*kept["student"].T)
            axis.set_title(heading(method, min(now, max(snapshots)), node), fontsize=10)

    shown = moments(sorted({step for snapshots, *_ in panels for step in snapshots}))
    shown += 12 * shown[-1:]  # it rests on the last
    files.atomically(file, lambda beside: FuncAnimation(figure, show, shown).save(
        beside, PillowWriter(fps=6)))  # made here, as one that is not written warns
    plt.close(figure)


def moments(steps: list[int]) -> list[int]:
    """Of the steps of all runs' snapshots those that the film shows: all early ones, then every
    fourth, and the last."""
    return [*(step for step in steps if step <= EARLY),
            *[step for step in steps if step > EARLY][::-4][::-1]]


def heading(method: str, now: int, node: int) -> str:
    """Of a panel, in as many lines as its width asks for."""
    where = f"node {node}" if node else "the teacher"
    return textwrap.fill(f"{method}, iteration {now}: to {where}", 45)
