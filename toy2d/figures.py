"""The figures of a run, drawn from its folder alone; README.md beside this file explains them."""

import functools
import json
from pathlib import Path

import matplotlib
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import disback
from toy2d.metrics import Evaluation
from toy2d.mixture import Mixture

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a screen)
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

DATA, TARGET, STUDENT, OTHER = "#b8b8b8", "#d95f02", "#1f5fa8", "#7a3fa0"


@torch.no_grad()
def draw(out: Path, path: disback.Path | None, compare: Path | None, net: nn.Module,
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


def draw_mismatch(file: Path, path: disback.Path | None, net: nn.Module, x0: Tensor,
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


def score_of_node(path: disback.Path | None, node: int, net: nn.Module, x: Tensor,
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


def draw_convergence(file: Path, out: Path, compare: Path | None, metric: str, label: str,
                     floor: float, floors_name: str) -> None:
    """A metric of log.jsonl and the mismatch degree against network evaluations, those of stage 1
    before them; `floor` is the least that the metric can reach."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    for run, color in ((out, STUDENT), (compare, OTHER)):
        if run is None:
            continue
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        metrics = disback.load_json(run / "metrics.json", "finish that run first")
        stage1 = metrics["network_evals"]["stage1"]
        at = [(stage1 + line["network_evals"]) / 1e6 for line in lines]
        name = {"disback": "DisBack", "vsd": "VSD"}[metrics["method"]]
        name += f" (stage 1: {stage1 / 1e6:.2f} M)" if stage1 else ""
        top.plot(at, [line[metric] for line in lines], color=color, label=name)
        bottom.plot(at, [line["mismatch"] for line in lines], color=color, label=name)
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
    for axis in (top.yaxis, bottom.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    top.legend()
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
    if disback.rank() == 0:
        beside = file.with_name("beside.gif")
        animation.save(beside, writer=PillowWriter(fps=6), dpi=80)
        beside.replace(file)
    plt.close(figure)


def read_snapshots(out: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """(step, {x0 [n, 2], node}) of each snapshot, the first first."""
    files = sorted((out / "snapshots").glob("*.safetensors"))
    return [(int(file.stem), load_file(file)) for file in files]


def switches(snapshots: list[tuple[int, dict[str, Tensor]]]) -> list:
    """The snapshots at which the target had just moved to another node."""
    return [after for before, after in zip(snapshots, snapshots[1:])
            if after[1]["node"] != before[1]["node"]]


def frame(x: Tensor) -> tuple[float, float]:
    """Limits of both axes that hold all points."""
    low, high = x.min().item(), x.max().item()
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def save(figure: plt.Figure, file: Path) -> None:
    disback.atomically(file, lambda beside: figure.savefig(beside, dpi=110, format="png"))
    plt.close(figure)
