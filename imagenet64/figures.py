"""The figures of a run, drawn from its folder alone; README.md beside this file explains them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import disback
from imagenet64.edm import to_uint8
from runtime.plots import (
    STUDENT,
    TARGET,
    draw_convergence,
    of_nodes,
    plt,
    read_snapshots,
    save,
    switches,
)

COLUMNS = 10  # images in a row, of as many classes, the same in every row


@torch.no_grad()
def draw(out: Path, path: disback.DegradationPath | None, compare: Path | None, net: nn.Module,
         sample: Callable[[nn.Module], Tensor], floor: float | None) -> None:
    """Write path.png and, where the distance to the data was measured, convergence.png.

    `net` is a denoiser that the nodes are loaded into; sample(net) draws images [40, c, h, w] from
    it, by many steps, of the snapshots' noise and labels; `floor`: what halves of the data differ.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    snapshots = read_snapshots(out)
    nodes = of_nodes(path, net, lambda net: sample(net).cpu())
    draw_path(folder / "path.png", nodes, snapshots)
    if floor is not None:
        draw_convergence(folder / "convergence.png", [out, compare] if compare else [out],
                         "frechet", "Fréchet distance to the digits", floor,
                         "two halves of the data")


def draw_path(file: Path, nodes: list[Tensor], snapshots: list) -> None:
    """Down the left, images of every node, teacher first; up the right, the student's, beside each
    node those that it made once that node had been its target."""
    last = len(nodes) - 1
    names = {last: f"node {last}:\ndegraded", 0: "node 0:\nthe teacher"}
    there = [(x, names.get(i, f"node {i}")) for i, x in enumerate(nodes)]
    switched = switches(snapshots)
    targets = [int(kept["node"]) for _, kept in snapshots[:1] + switched]
    back = [(snapshots[0][1]["x0"], "the start")]
    back += [(kept["x0"], f"after node {target}:\niteration {step}")
             for target, (step, kept) in zip(targets, dict([*switched, snapshots[-1]]).items())]
    rows = max(len(there), len(back))
    figure, axes = plt.subplots(rows, 2, figsize=(13, 0.62 * rows + 0.5), layout="constrained",
                                squeeze=False)
    titles = (("The path, downwards: each node's images, in 18 steps", TARGET),
              ("The way back, upwards: the student's images, in one", STUDENT))
    for column, part, (title, color) in zip(axes.T, (there, back[::-1]), titles):
        column[0].set_title(title, color=color)
        for axis in column:
            axis.set_axis_off()
        for axis, (images, name) in zip(column[len(column) - len(part):], part):
            show(axis, images[:COLUMNS])
            axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center")
    save(figure, file)


def show(axis: plt.Axes, images: Tensor) -> None:
    """Images [n, c, h, w] in rows of 10, n a multiple of it, with a thin gap between them."""
    axis.imshow(grid(to_uint8(images)).numpy(), cmap="gray", vmin=0, vmax=255,
                interpolation="nearest")


def grid(images: Tensor, columns: int = COLUMNS) -> Tensor:
    """One uint8 image [h, w, c], c = 1 or 3, of uint8 images [n, c, h, w], in rows."""
    images = nn.functional.pad(images, (0, 1, 0, 1), value=255)
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])
    n, channels, height, width = images.shape
    return images.reshape(n // columns, columns, channels, height, width).permute(
        0, 3, 1, 4, 2).reshape(n // columns * height, columns * width, channels)
