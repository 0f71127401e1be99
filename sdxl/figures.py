"""The figures of a run: what every node draws, the student at every switch, and the mismatch."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

import disback
from runtime.plots import curves, of_nodes, plt, read_snapshots, save, switches


def draw(out: Path, path: disback.DegradationPath | None, compare: Path | None, vae: AutoencoderKL,
         teacher: torch.nn.Module, sample: Callable, prompts: list[str]) -> None:
    """path.png, student.png and mismatch.png in OUT/figures. `sample` draws the latents [n, ...]
    of a network from the noise and `prompts` (n) that the snapshots have; the columns are those."""
    (out / "figures").mkdir(exist_ok=True)
    vae.to(next(teacher.parameters()).device)
    nodes = of_nodes(path, teacher, lambda net: decode(vae, sample(net)))
    if path:
        path.load(0, teacher)
    rows = [(f"node {i}" if i else "teacher", pictures) for i, pictures in enumerate(nodes)]
    sheet(out / "figures" / "path.png", "What each node of the path draws in many steps, guided",
          rows, prompts)
    rows = [(f"{step}: {label}", decode(vae, x0.to(vae.device)))
            for step, label, x0 in moments(out)]
    sheet(out / "figures" / "student.png", "The student's one step: at the start, after each "
          "switch of the target, at the end", rows, prompts)
    draw_mismatch(out / "figures" / "mismatch.png", [run for run in (out, compare) if run])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> list:
    """RGB pictures [h, w, 3] in 0 to 1 of latents [n, 4, h, w]; one at a time, to spare memory."""
    pictures = (vae.decode(latent[None].float() / vae.config.scaling_factor).sample[0]
                for latent in latents)
    pictures = [(x / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu() for x in pictures]
    if not all(picture.isfinite().all() for picture in pictures):
        raise disback.Refusal("a picture is not finite: the run has diverged, try lower rates; or "
                              "the VAE of its --model has weights too large")
    return [picture.numpy() for picture in pictures]


def moments(out: Path) -> list[tuple[int, str, Tensor]]:
    """(step, label, x0 [n, 4, h, w]) of the first snapshot, those after a switch, and the last."""
    kept = read_snapshots(out)
    shown = dict([kept[0], *switches(kept), kept[-1]])
    labels = {step: f"to node {int(held['node'])}" for step, held in shown.items() if held["node"]}
    labels[kept[-1][0]] = "the end"
    return [(step, labels.get(step, "to the teacher"), held["x0"]) for step, held in shown.items()]


def sheet(file: Path, title: str, rows: list[tuple[str, list]], prompts: list[str]) -> None:
    """A row of pictures for each label, a column for each prompt."""
    figure, axes = plt.subplots(len(rows), len(prompts), squeeze=False, layout="constrained",
                                figsize=(1.6 * len(prompts), 1.6 * len(rows) + 1))
    for line, (label, pictures) in zip(axes, rows):
        line[0].set_ylabel(label, fontsize=8)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    for axis, prompt in zip(axes[0], prompts):
        axis.set_title("\n".join(textwrap.wrap(prompt, 22)[:4]), fontsize=7, parse_math=False)
    figure.suptitle(title, fontsize=10)
    save(figure, file)


def draw_mismatch(file: Path, runs: list[Path]) -> None:
    """The mismatch degree of each run over its iterations."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    curves({"mismatch": axis}, runs, in_steps=True)
    axis.set(xlabel="iteration", ylabel="mismatch degree", ylim=(0, None))
    axis.set_title("Fake and target apart (dotted: the target has switched)", fontsize=10)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    save(figure, file)
