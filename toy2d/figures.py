"""The figures of a run, drawn from its folder alone; README.md beside this file explains them."""

import functools
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor, nn

import disback
from runtime import files, ranks
from runtime.plots import (
    DATA,
    STUDENT,
    TARGET,
    draw_convergence,
    plt,
    read_snapshots,
    save,
    switches,
)
from toy2d.metrics import Evaluation
from toy2d.mixture import Mixture


@torch.no_grad()
def draw(out: Path, path: disback.DegradationPath | None, compare: Path | None, net: nn.Module,
         sample: callable, data: Mixture) -> None:
    """Write mismatch.png, path.png, convergence.png and backtracking.gif to `out`/figures.

    `net` is a denoiser that the nodes are loaded into; sample(net, n) draws n points from it.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    snapshots = read_snapshots(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nodes = []
        for node in range(len(path) if path else 1):
            if path:
                path.load(node, net)
            nodes.append(sample(functools.partial(answers, net), 1000))
        points = data.sample(1000)
        evaluate = Evaluation(data)
        floors = [evaluate.of(data.sample(evaluate.samples))["swd"] for _ in range(20)]
        draw_mismatch(folder / "mismatch.png", path, net, snapshots[0][1]["x0"], data)
    draw_path(folder / "path.png", nodes, snapshots, points)
    draw_convergence(folder / "convergence.png", out, compare, "swd",
                     "SWD of the student to the data", sum(floors) / 20, "two sets of data")
    draw_gif(folder / "backtracking.gif", nodes, snapshots, points)


def draw_mismatch(file: Path, path: disback.DegradationPath | None, net: nn.Module, x0: Tensor,
                  data: Mixture) -> None:
    """What a network answers at the student's first samples, what would be right, and the error.

    For the teacher the right answer is the data's score, for the degraded node the score of the
    student's own samples; both are exact."""
    last = len(path) - 1 if path else 0
    rows = [(node, sigma) for node in sorted({0, last}) for sigma in (0.2, 5.0)]
    figure, axes = plt.subplots(len(rows), 3, figsize=(9.6, 2.75 * len(rows)), layout="constrained",
                                squeeze=False)
    for (node, sigma), row in zip(rows, axes):
        x = x0[:60] + sigma * torch.randn(60, 2)
        exact = (Mixture.of_samples(x0) if node else data).score(x, sigma)
        answer = score_of_node(path, 0, net, x, sigma)
        teachers = relative_error(answer, exact)
        if node:
            answer = score_of_node(path, node, net, x, sigma)
        error = answer - exact
        size = f"difference: {relative_error(answer, exact):.0%} of the exact"
        size += f"\n(the teacher's would be {teachers:,.0%})" if node else ""
        scale = torch.cat([answer, exact]).norm(dim=1).max().item() * 3
        asked = f"degraded node {node}" if node else "teacher"
        right = "the student's samples" if node else "the data"
        for axis, arrows, title, color in (
                (row[0], answer, f"{asked}: its score", TARGET),
                (row[1], exact, f"exact score of {right}", STUDENT),
                (row[2], error, size, "#c02020")):
            axis.plot(*x.T, ".", color=DATA, markersize=3)
            axis.quiver(*x.T, *arrows.T, color=color, angles="xy", scale=scale, width=0.006)
            axis.set_title(title, fontsize=9)
            axis.margins(0.2)
            axis.set_aspect("equal", adjustable="datalim")
        row[0].set_ylabel(f"$\\sigma$ = {sigma:g}", fontsize=11)
    figure.suptitle("The score at the student's first samples (grey: the samples, noised)")
    save(figure, file)


def score_of_node(path: disback.DegradationPath | None, node: int, net: nn.Module, x: Tensor,
                  sigma: float) -> Tensor:
    """The score at x [n, 2] of a node, which is loaded into net."""
    if path:
        path.load(node, net)
    return (answers(net, x, torch.full((len(x), 1), sigma)) - x) / sigma**2


def answers(net: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma) by `net`, wherever that is, of points on the CPU, where all figures' are."""
    device = next(net.parameters()).device
    return net(x.to(device), sigma.to(device)).cpu()


def relative_error(answer: Tensor, exact: Tensor) -> float:
    """Mean length of the difference over mean length of the exact vectors."""
    return ((answer - exact).norm(dim=1).mean() / exact.norm(dim=1).mean()).item()


def draw_path(file: Path, nodes: list[Tensor], snapshots: list, points: Tensor) -> None:
    """Samples of every node, teacher first; below them the student after every switch."""
    switched = [snapshots[0], *switches(snapshots), snapshots[-1]]
    last = len(nodes) - 1
    names = {last: f"node {last}: degraded", 0: "node 0: the teacher"}
    there = [(x, names.get(i, f"node {i}"), TARGET) for i, x in enumerate(nodes)]
    back = [(kept["x0"], f"iteration {step}:\nto node {int(kept['node'])}", STUDENT)
            for step, kept in switched]
    back[-1] = (*back[-1][:1], f"iteration {snapshots[-1][0]}:\nthe end", STUDENT)
    columns = min(6, max(len(there), len(back)))
    rows = [-(-len(part) // columns) for part in (there, back)]
    figure, axes = plt.subplots(sum(rows), columns, figsize=(2 * columns, 2.2 * sum(rows)),
                                layout="constrained", sharex=True, sharey=True, squeeze=False)
    limits = frame(torch.cat([points, snapshots[0][1]["x0"]]))
    for axis in axes.flat:
        axis.set_axis_off()
    for part, first_row in ((there, 0), (back, rows[0])):
        for axis, (x, title, color) in zip(axes[first_row:].flat, part):
            axis.set_axis_on()
            axis.plot(*points.T, ".", color=DATA, markersize=1)
            axis.plot(*x[:1000].T, ".", color=color, markersize=1)
            axis.set_title(title, fontsize=9)
            axis.set(xlim=limits, ylim=limits, xticks=[], yticks=[], aspect="equal")
    figure.suptitle("Orange: samples of each node, the path on which the teacher degrades.   "
                    "Blue: the student on the way back.   Grey: data", fontsize=11)
    save(figure, file)


def draw_gif(file: Path, nodes: list[Tensor], snapshots: list, points: Tensor) -> None:
    """The student's samples on their way through the targets to the data."""
    figure, axis = plt.subplots(figsize=(4.2, 4.4), layout="constrained")
    limits = frame(torch.cat([points, snapshots[0][1]["x0"]]))
    axis.set(xlim=limits, ylim=limits, xticks=[], yticks=[], aspect="equal")
    style = dict(marker=".", linestyle="", markersize=2.5)
    axis.plot(*points.T, color=DATA, label="data", **style)
    (target,) = axis.plot([], [], color=TARGET, label="target", **style)
    (student,) = axis.plot([], [], color=STUDENT, label="student", **style)
    axis.legend(loc="lower right", markerscale=3)

    def show(index: int) -> None:
        step, kept = snapshots[min(index, len(snapshots) - 1)]
        node = int(kept["node"])
        target.set_data(*nodes[node].T if node else ([], []))
        student.set_data(*kept["x0"][:1000].T)
        axis.set_title(f"iteration {step}: to " + (f"node {node}" if node else "the teacher"))

    animation = FuncAnimation(figure, show, frames=len(snapshots) + 10)  # rest on the last
    if ranks.rank() == 0:
        files.atomically(
            file, lambda beside: animation.save(beside, writer=PillowWriter(fps=6), dpi=80))
    plt.close(figure)


def frame(x: Tensor) -> tuple[float, float]:
    """Limits of both axes that hold all points."""
    low, high = x.min().item(), x.max().item()
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
