"""Plots of the methods whose world is not a point cloud; a docstring is its title."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from runtime import files
from runtime.errors import must
from runtime.plots import DATA, STUDENT, TARGET, plt


def first(rows: dict, method: str, back: bool = False) -> dict:
    return rows[method, "", back, 1][0]["numbers"]


def cloud(out: Path, name: str, width: int, *keys: str) -> list[torch.Tensor]:
    """What seed 0 of a row has kept for the figure, [n, width]; Refusal where it is not there."""
    file = out / "clouds" / f"{name}.safetensors"
    with files.blame(f"{file} is missing or broken: run that METHOD again, with seed 0"):
        found = load_file(file)
        must(all(found[key].numel() and found[key].isfinite().all() for key in keys), "no numbers")
        return [found[key].view(-1, width) for key in keys]


def signal(axis: plt.Axes, out: Path, rows: dict) -> None:
    """amplitude of two waves, 1 is right"""
    found, names = first(rows, "hipa"), ("one step", "squares", "patched", "many steps")
    for shift, wave, color in ((-0.2, "low", DATA), (0.2, "high", STUDENT)):
        axis.bar([i + shift for i in range(4)], [found[f"{wave}, {name}"] for name in names], 0.4,
                 color=color, label=wave)
    axis.set_xticks(range(4), ("one\nstep", "patch:\nsquares", "patch:\n+ high", "many\nsteps"))
    axis.set(ylim=(0, 1.3))
    axis.legend(fontsize=7, ncols=2, loc="upper center")


def acceptance(axis: plt.Axes, out: Path, rows: dict) -> None:
    """share of tokens accepted"""
    names = ("without", "FKL", "RKL", "JSD", "TVD")
    for shift, back, color in ((-0.2, False, STUDENT), (0.2, True, TARGET)):
        if ("distillspec", "", back, 1) in rows:
            sizes = [first(rows, "distillspec", back)[name] for name in names]
            axis.bar([i + shift for i in range(5)], sizes, 0.4, color=color)
    axis.set_xticks(range(5), ("before", *names[1:]))
    axis.set(ylim=(0.85, 1))


def fields(axis: plt.Axes, out: Path, rows: dict) -> None:
    """the field after 200 steps"""
    both = [field.T for field in cloud(out, "pvd", 48, "from rays", "distilled")]
    axis.imshow(torch.cat(both, dim=1), origin="lower", cmap="magma", vmax=both[1].max())
    axis.set_xticks((24, 72), ("from rays", "distilled"))
    axis.set_yticks([])


def examples(axis: plt.Axes, out: Path, rows: dict) -> None:
    """accuracy over examples"""
    found, sizes = first(rows, "stepbystep"), (100, 400, 1600)
    for task, name, color in (("label", "label only", DATA),
                              ("rationale", "with rationale", STUDENT)):
        axis.plot(sizes, [found[f"{task}, {n}"] for n in sizes], "o-", color=color, label=name)
    axis.set_xscale("log")
    axis.set_xticks(sizes, ("100", "400", "1600"))
    axis.minorticks_off()
    axis.legend(fontsize=7)
