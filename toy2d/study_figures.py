"""The study's figures and summary.json, from its lines alone; README.md reads them.

A run arrives if it ends at an SWD of at most 0.5. Shares of runs have Wilson's 95% intervals,
medians bootstrapped ones.
"""

import json
import math
from pathlib import Path

import numpy as np

from runtime import files
from runtime.plots import DATA, OTHER, STUDENT, TARGET, plt, readable, save
from runtime.study import Lines, median_interval, of, paired, pooled, rates_of, wilson
from toy2d.study_runs import LEVELS, SHARES

ARRIVED = 0.5  # SWD
DRAWN = 2e-3, 2e-3  # rates whose curves are kept
FIRST = "2D d8", "4D d8", "16D d8"  # cells of the window that is looked at first
COLORS = {"vsd": OTHER, "disback": STUDENT, "degraded fake": TARGET, "vsd k2": "#2c8c5a",
          "disback k2": "#5aa0dc", "linear": "#c03070"}
NAMES = {"vsd": "VSD", "disback": "DisBack", "degraded fake": "degraded fake alone",
         "vsd k2": "VSD, k = 2", "disback k2": "DisBack, k = 2", "linear": "DisBack, linear"}
ROWS = {"spread": "spread ÷ the data's", "bias": "fake's bias", "teacher": "teacher's error",
        "swd": "SWD"}  # of the mechanism


def end(run: dict) -> float:
    """The SWD at the end; infinite for a run that diverged."""
    return math.inf if run["final"]["swd"] is None else run["final"]["swd"]


def arrived(runs: list[dict]) -> tuple[float, float, float]:
    """The share of runs that arrive, and its interval."""
    return wilson(sum(end(run) <= ARRIVED for run in runs), len(runs))


def common(lines: Lines, cell: str) -> list[tuple]:
    """The rates that VSD and DisBack have both."""
    disback = rates_of(lines, cell, "disback")
    return [rates for rates in rates_of(lines, cell, "vsd") if rates in disback]


def order(cell: str) -> tuple:
    """Cells by dimensions and distance, then the others by name."""
    numbers = [int(part) for part in cell.replace("D d", " ").split() if part.isdigit()]
    return (numbers or [math.inf], cell)


def seeds_of(lines: Lines, cell: str) -> int:
    return len({key[2] for key in lines if key[0] == cell})


def cost(cell: str, run: dict) -> float:
    """The share of the budget, stage 1 included, after which the SWD is first at a level. In 16
    dimensions the ends of most runs are above the others' level."""
    reached = run["reach"][LEVELS.index(0.5 if cell.startswith("16D") else 0.3)]
    return math.inf if reached is None else of_budget(run, reached)


def by_seed(cell: str, runs: dict[int, dict]) -> dict[int, float]:
    """The costs."""
    return {seed: cost(cell, run) for seed, run in runs.items()}


def of_budget(run: dict, share: float) -> float:
    """Of the budget, at a share of stage 2."""
    return run["stage1"] + (1 - run["stage1"]) * share


def costs(lines: Lines, cell: str, arm: str) -> dict[int, float]:
    """By seed the cost at the arm's best rate, which is chosen on the seeds of the other half: that
    with the least median cost, and among those that never get there the least median end."""
    found = {rates: of(lines, cell, arm, rates) for rates in rates_of(lines, cell, arm)}
    judged = {}
    for half in (0, 1):
        ranks = {}
        for rates, runs in found.items():
            others = {seed: run for seed, run in runs.items() if seed % 2 != half}
            ranks[rates] = tuple(np.median([*values] or [math.inf]) for values in (
                by_seed(cell, others).values(), map(end, others.values())))
        best = found[min(ranks, key=ranks.get)]
        judged |= by_seed(cell, {seed: run for seed, run in best.items() if seed % 2 == half})
    return judged


def ratio(lines: Lines, cell: str, arm: str) -> tuple[float, float, float] | None:
    """An arm's cost over plain VSD's, both at their best rates, paired by seed."""
    if not rates_of(lines, cell, arm):
        return None
    return paired(costs(lines, cell, arm), costs(lines, cell, "vsd"))


def summary(lines: Lines) -> list[dict]:
    """Of every cell, arm and pair of rates, with intervals: the share that arrives, the medians of
    the ends, the costs, and the costs over plain VSD's at the same rates, paired."""
    rows = []
    for cell, arm, rates in dict.fromkeys((key[0], key[1], key[3]) for key in sorted(lines)):
        runs, vsd = of(lines, cell, arm, rates), of(lines, cell, "vsd", rates)
        found, theirs = by_seed(cell, runs), by_seed(cell, vsd)
        rows.append({"cell": cell, "arm": arm, "rates": rates, "runs": len(runs),
                     "arrived": arrived([*runs.values()]),
                     "swd": median_interval([*map(end, runs.values())]),
                     "cost": median_interval([*found.values()]), "ratio": paired(found, theirs)})
    return rows


def draw(out: Path, lines: Lines, later: dict[str, tuple[int, ...]]) -> None:
    """Write summary.json and the figures to `out`; what has no lines yet is left out. The figures
    leave out the `later` seeds, each kind of which has a name."""
    write_summary(out / "summary.json", lines, later)
    judged = of_seeds(lines, later)
    both = sorted((cell for cell in {key[0] for key in judged} if common(judged, cell)), key=order)
    several = [cell for cell in both if len(common(judged, cell)) > 1]
    figures = {
        "window": (draw_window, [cell for cell in several if cell in FIRST]),
        "windows": (draw_window, several),
        "mechanism": (draw_mechanism, [cell for cell in both if any(
            "bias" in run for run in of(judged, cell, "vsd", DRAWN).values())]),
        "cost": (draw_cost, both),
        "ablations": (draw_ablations, [cell for cell in both
                                       if rates_of(judged, cell, "forward")]),
        "map": (draw_map, [cell for cell in both if cell[0].isdigit() and cell.count(" ") == 1])}
    for name, (figure, cells) in figures.items():
        if len(cells) >= (3 if name == "map" else 1):
            save(figure(judged, cells), out / f"{name}.png")


def of_seeds(lines: Lines, later: dict[str, tuple[int, ...]], kind: str = "") -> Lines:
    """The lines, in order, of a kind of later seeds, or of all that are none."""
    names = {seed: name for name, seeds in later.items() for seed in seeds}
    return {key: lines[key] for key in sorted(lines) if names.get(key[2], "") == kind}


def write_summary(file: Path, lines: Lines, later: dict[str, tuple[int, ...]]) -> None:
    """Of each kind of seeds; a row a line."""
    kinds = {"seeds": ""} | {name: name for name in later}
    text = json.dumps({name: summary(of_seeds(lines, later, kind))
                       for name, kind in kinds.items()})
    text = text.replace("Infinity", '"never"').replace('{"cell"', '\n{"cell"') + "\n"
    files.atomically(file, lambda beside: beside.write_text(text))


def panels(count: int, height: float = 3.0) -> tuple[plt.Figure, list[plt.Axes]]:
    columns, rows = min(count, 3), math.ceil(count / 3)
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharey=True, layout="constrained",
                                figsize=(2.4 + 3.2 * columns, 1 + height * rows))
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def legend(figure: plt.Figure, columns: int) -> None:
    """Of all arms that some panel has."""
    drawn = {label: mark for axis in figure.axes
             for mark, label in zip(*axis.get_legend_handles_labels())}
    drawn = {label: drawn[label] for label in NAMES.values() if label in drawn}
    figure.legend(drawn.values(), drawn, loc="outside upper center", ncols=columns)


def draw_window(lines: Lines, cells: list[str]) -> plt.Figure:
    """(a) The share of runs that arrive, over the learning rate."""
    figure, axes = panels(len(cells))
    for axis, cell in zip(axes, cells):
        for i, arm in enumerate(NAMES):
            draw_shares(axis, lines, cell, arm, 1.04**(i - 2))  # beside each other
        axis.set(title=f"{cell}: {seeds_of(lines, cell)} seeds", xscale="log", ylim=(-0.03, 1.03),
                 xlabel="learning rate of the student")
        ticks = sorted({key[3][0] for key in lines if key[0] == cell})
        axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"share of runs that end at SWD ≤ {ARRIVED}")
    figure.supxlabel("Hollow squares: the fake's rate is twice the student's.", fontsize=10)
    legend(figure, min(6, 1 + 2 * len(cells)))
    return figure


def draw_shares(axis: plt.Axes, lines: Lines, cell: str, arm: str, shift: float) -> None:
    """Where both rates are alike, with intervals; hollow where the fake's is twice as high."""
    pairs = rates_of(lines, cell, arm)
    alike, faster = ([one for one in pairs if one[1] == times * one[0]] for times in (1, 2))
    if alike:
        middle, low, high = np.transpose([arrived(pooled(lines, cell, arm, [rates]))
                                          for rates in alike])
        axis.errorbar([rates[0] * shift for rates in alike], middle, [middle - low, high - middle],
                      color=COLORS[arm], capsize=3, marker="o", label=NAMES[arm])
    axis.plot([rates[0] * shift for rates in faster],
              [arrived(pooled(lines, cell, arm, [rates]))[0] for rates in faster],
              "s", color=COLORS[arm], markerfacecolor="white")


def draw_mechanism(lines: Lines, cells: list[str]) -> plt.Figure:
    """(b) What happens on the way: medians of the seeds, and their quartiles as bands."""
    figure, axes = plt.subplots(len(ROWS), len(cells), figsize=(1 + 3.6 * len(cells), 9),
                                sharex=True, sharey="row", squeeze=False, layout="constrained")
    for column, cell in zip(axes.T, cells):
        column[0].set_title(f"{cell}, rates {DRAWN[0]:g}")
        for axis, (name, label) in zip(column, ROWS.items()):
            for arm in NAMES:
                if runs := of(lines, cell, arm, DRAWN):
                    draw_band(axis, [*runs.values()], name, arm)
            axis.set(xscale="log", ylabel=label if cell == cells[0] else "")
            axis.grid(alpha=0.25)
        column[-1].set_yscale("log")
        readable(column[-1])
        column[-1].set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["1%", "3%", "10%", "30%", "100%"])
        column[-1].set_xlabel("of the budget, stage 1 included")
    legend(figure, min(6, 1 + 2 * len(cells)))
    return figure


def draw_band(axis: plt.Axes, runs: list[dict], name: str, arm: str) -> None:
    curves = np.array([run[name] for run in runs], float)  # None becomes nan
    low, middle, high = np.nanquantile(curves, [0.25, 0.5, 0.75], axis=0)
    at = [of_budget(runs[0], share) for share in SHARES]
    axis.fill_between(at, low, high, color=COLORS[arm], alpha=0.15, linewidth=0)
    axis.plot(at, middle, color=COLORS[arm], label=NAMES[arm])


def draw_cost(lines: Lines, cells: list[str]) -> plt.Figure:
    """(c) Each arm's cost at its best rate over plain VSD's at its own."""
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.6 * len(cells)), layout="constrained")
    arms = [arm for arm in NAMES if arm not in ("vsd", "linear")]  # linear has fewer rates
    for j, arm in enumerate(arms):
        for i, cell in enumerate(cells):
            if (found := ratio(lines, cell, arm)) not in (None, (1, 1, 1)):  # draws: nobody arrives
                middle, low, high = np.minimum(found, 3)
                axis.errorbar(middle, i + 0.15 * (j - 1.5), color=COLORS[arm], marker="o",
                              xerr=[[middle - low], [high - middle]], capsize=3, label=NAMES[arm])
    axis.axvline(1, color=DATA)
    axis.set_yticks(range(len(cells)), [
        f"{cell}\nseeds: {seeds_of(lines, cell)}, rates: {len(common(lines, cell))}"
        for cell in cells])
    axis.set(xlabel="evaluations to SWD 0.3 (16D: 0.5) ÷ plain VSD's, each at its best rate\n"
             "(left of 1: cheaper; 3: or more; none: no arm gets there)",
             xlim=(0, 3.05), ylim=(len(cells) - 0.5, -0.5))
    axis.grid(alpha=0.25)
    legend(figure, 4)
    return figure


def draw_ablations(lines: Lines, cells: list[str]) -> plt.Figure:
    """(d) Other walks, at the rates that they have: the share of runs that arrive; and the
    cost over that of the default walk, paired by seed."""
    arms = [*NAMES, *sorted({key[1] for key in lines if key[0] in cells} - NAMES.keys())]
    figure, axes = plt.subplots(len(cells), 2, figsize=(9, 1 + 0.21 * len(arms) * len(cells)),
                                sharex="col", squeeze=False, layout="constrained")
    for (left, right), cell in zip(axes, cells):
        for j, rates in enumerate(rates_of(lines, cell, "forward")):
            theirs = by_seed(cell, of(lines, cell, "disback", rates))
            for i, arm in enumerate(arms):
                if runs := of(lines, cell, arm, rates):
                    ours = by_seed(cell, runs)
                    for axis, found in ((left, arrived([*runs.values()])),
                                        (right, np.minimum(paired(ours, theirs), 3))):
                        axis.errorbar(found[0], i + 0.3 * j - 0.15, capsize=2, marker="o",
                                      markersize=4, color=(STUDENT, TARGET)[j], xerr=[
                                          [found[0] - found[1]], [found[2] - found[0]]],
                                      label=f"rates {rates[0]:g}")
        left.set(ylabel=cell, xlim=(0, 1.03), yticks=range(len(arms)))
        left.set_yticklabels([NAMES.get(arm, arm) for arm in arms])
        right.set(xlim=(0, 3.05), yticks=range(len(arms)), yticklabels=[])
        right.axvline(1, color=DATA)
        for axis in (left, right):
            axis.set_ylim(len(arms) - 0.5, -0.5)
            axis.grid(alpha=0.25)
    left.set_xlabel(f"share of runs that end at SWD ≤ {ARRIVED}")
    right.set_xlabel("evaluations to SWD 0.3 (16D: 0.5)\n÷ DisBack's (3: or more)")
    marks = dict(zip(*reversed(left.get_legend_handles_labels())))
    figure.legend(marks.values(), marks, loc="outside upper center", ncols=2)
    return figure


def draw_map(lines: Lines, cells: list[str]) -> plt.Figure:
    """(e) Over dimensions and distance: who arrives more often, at the rates that both arms have,
    and linear where it has them all; and who is cheaper at the best rates."""
    rows, columns = (sorted({cell.split()[i] for cell in cells}, key=lambda name: int(
        name.strip("dD"))) for i in (0, 1))
    figure, axis = plt.subplots(figsize=(1.5 + 2.4 * len(columns), 1 + 1.3 * len(rows)),
                                layout="constrained")
    for cell in cells:
        y, x = (names.index(name) for names, name in zip((rows, columns), cell.split()))
        vsd, ours = (pooled(lines, cell, arm, common(lines, cell)) for arm in ("vsd", "disback"))
        of_vsd, of_ours = (arrived(runs)[0] for runs in (vsd, ours))
        color = plt.get_cmap("RdBu")(0.5 + 0.4 * (of_ours - of_vsd))
        axis.add_patch(plt.Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=color))
        slow = pooled(lines, cell, "linear", common(lines, cell))
        said = f"linear {arrived(slow)[0]:.0%}\n" if len(slow) == len(ours) else ""
        cost = "cost × {:.2f} [{:.2f}, {:.2f}]".format(*ratio(lines, cell, "disback"))
        axis.text(x, y, f"VSD {of_vsd:.0%} of {len(vsd)}\nDisBack {of_ours:.0%}\n"
                  f"{said}{cost.replace('inf', 'never')}", ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(columns)), [f"distance {name[1:]}" for name in columns])
    axis.set_yticks(range(len(rows)), [f"{name[:-1]} dimensions" for name in rows])
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axis.set_title("Runs that arrive, at all rates together. Cost: DisBack's evaluations\n"
                   "to SWD 0.3 (16D: 0.5) over VSD's, each at its best rate.\n"
                   "Blue: DisBack arrives more often. Orange: VSD does. White: not run.",
                   fontsize=10)
    return figure
