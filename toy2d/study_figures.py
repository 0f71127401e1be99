"""The study's statistics and figures, from its lines alone; README.md beside this file reads them.

Intervals are 95% percentile bootstraps over the seeds. A run that does not reach a distance within
its budget never does: it counts as infinitely many evaluations.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtime import files
from runtime.plots import DATA, OTHER, STUDENT, TARGET, plt, readable, save
from runtime.study import first_reach, median_interval, paired_ratio
from toy2d import study_grid as study

COLORS = {"disback": STUDENT, "vsd_tuned": TARGET, "vsd": OTHER}
NAMES = {
    "disback": "DisBack", "vsd_tuned": "tuned VSD", "vsd": "VSD, default rates",
    "degraded_fake": "no path, only the degraded start", "path_teacher_fake": "fake starts as "
    "the teacher", "adaptive": "adaptive switching", "forward": "path in forward order",
    "interpolated": "nodes interpolated in weights", "linear": "nodes spaced linearly",
    "log": "nodes spaced in log steps", "n1_i10": "1 node (no target between)",
    "n3_i33": "3 nodes, interval 33", "n30_i3": "30 nodes, interval 3"}
Lines = dict[tuple, dict]


# ----------------------------------------------------------------------------------- statistics


def judged(grid: study.Grid, lines: Lines, cell: str, arm: str) -> list[dict]:
    """The lines of the evaluation seeds at the arm's rates, in the order of the seeds."""
    rates = study.chosen(grid, lines, cell, arm)
    found = [lines.get((cell, arm, seed, rates)) for seed in grid.seeds]
    return [line for line in found if line]


def reaches(lines: list[dict], level: float) -> dict[int, float]:
    """Thousands of evaluations to the level by seed."""
    return {line["seed"]: first_reach(line["curve"]["kevals"], line["curve"]["swd"], level)
            for line in lines}


def compare(grid: study.Grid, lines: Lines, cell: str, arm: str = "disback",
            factor: float = 1.0) -> dict | None:
    """An arm against tuned VSD in a cell, to `factor` times the median SWD at which that ends its
    budget: the paired ratio, and both arms' evaluations as shares of the budget."""
    vsd, other = (judged(grid, lines, cell, name) for name in ("vsd_tuned", arm))
    seeds = sorted({line["seed"] for line in vsd} & {line["seed"] for line in other})
    if not seeds:
        return None
    level = factor * float(np.median([study.final_swd(line) for line in vsd]))
    budget = grid.budget[cell] * 8 * study.batch_of(grid, cell) / 1e3
    theirs, ours = reaches(vsd, level), reaches(other, level)
    ratios = [paired_ratio(ours[seed], theirs[seed], budget) for seed in seeds]
    return {"level": level, "seeds": len(seeds), "ratio": median_interval(ratios),
            "share": median_interval([ours[seed] / budget for seed in seeds]),
            "vsd_share": median_interval([theirs[seed] / budget for seed in seeds]),
            "never": sum(math.isinf(ours[seed]) for seed in seeds),
            "vsd_never": sum(math.isinf(theirs[seed]) for seed in seeds)}


def table(grid: study.Grid, lines: Lines) -> list[dict]:
    """Of every cell and arm: rates, final metrics and the comparison with tuned VSD."""
    rows = []
    for cell, arms in grid.arms.items():
        for arm in arms:
            found = judged(grid, lines, cell, arm)
            if found:
                row = {"cell": cell, "arm": arm, "rates": study.chosen(grid, lines, cell, arm),
                       "seeds": len(found), "failed": sum("failed" in line for line in found),
                       "swd": median_interval([study.final_swd(line) for line in found])}
                for name in ("mode_tv", "off_mode"):
                    ends = [line["final"][name] for line in found if "final" in line]
                    row[name] = median_interval(ends) if ends else None
                for name, factor in (("to_end", 1.0), ("to_twice", 2.0)):
                    row[name] = compare(grid, lines, cell, arm, factor)
                rows.append(row)
    return rows


def rounded(value: object) -> object:
    """Numbers with 4 digits, "never" for infinity: JSON has none."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else "never"
    return value


# -------------------------------------------------------------------------------------- figures


def draw(out: Path, grid: study.Grid, lines: Lines) -> None:
    """Write the six figures and summary.json to `out`; what has no lines yet is left out."""
    rows = rounded(table(grid, lines))
    text = ",\n".join(json.dumps(row) for row in rows)
    files.atomically(out / "summary.json", lambda file: file.write_text(f"[{text}]\n"))
    for name, figure in (("map", draw_map), ("convergence", draw_convergence),
                         ("halves", draw_halves), ("ablation", draw_ablation),
                         ("trade", draw_trade), ("rates", draw_rates)):
        drawn = figure(grid, lines)
        if drawn:
            save(drawn, out / f"{name}.png")


def draw_map(grid: study.Grid, lines: Lines) -> plt.Figure | None:
    """(a) The paired ratio of evaluations over start and weighting; above to the SWD at which
    tuned VSD ends, which half of its seeds just miss, below to twice that, which is off the
    plateau."""
    columns = [[f"ring-{start}-{w}" for w in study.WEIGHTINGS] for start in study.STARTS]
    others = [cell for cell in study.CELLS if not cell.startswith("ring")]  # 3 "poor", 3 others
    columns += [others[:3], others[3:]]
    cells = {cell: (x, y) for x, column in enumerate(columns) for y, cell in enumerate(column)}
    if not any(compare(grid, lines, cell) for cell in cells if cell in grid.arms):
        return None
    figure, axes = plt.subplots(2, 1, figsize=(11.5, 9.6), layout="constrained")
    starts = ["the teacher's copy", *(f"distance {s}" for s in list(study.STARTS)[1:])]
    for axis, factor, level in zip(axes, (1.0, 2.0), ("the SWD", "twice the SWD")):
        for cell, at in cells.items():
            draw_cell(axis, *at, cell, compare(grid, lines, cell, factor=factor))
        axis.set_xticks(range(len(columns)), [
            *starts, "distance 8, teacher\nof 300 steps", "others, all\nwith weighting eps"])
        axis.set_yticks(range(3), [f"weighting\n{w}" for w in study.WEIGHTINGS])
        axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(2.5, -0.5))
        axis.tick_params(length=0)
        axis.axvline(len(starts) - 0.5, color="black", linewidth=2)
        axis.set_title(f"to {level} at which tuned VSD ends its budget", fontsize=11)
    figure.suptitle(
        "DisBack's network evaluations / tuned VSD's, median of paired seeds and 95% interval\n"
        "blue, below 1: DisBack wins.  red, above 1: it loses.  grey: undecided\n"
        "where neither arrives, a draw, 1; where only VSD does not, its budget counts")
    return figure


def draw_cell(axis: plt.Axes, x: int, y: int, cell: str, result: dict | None) -> None:
    """One cell of the map: the ratio, its interval, how many never got there."""
    if cell.split("-")[0] not in ("ring", "poor"):
        axis.text(x, y - 0.38, cell, ha="center", va="center", fontsize=8)
    if result is None:
        return
    ratio, low, high = result["ratio"]
    loses = ratio > 1 and low >= 1  # an interval that only draws hold at 1 does not excuse
    decided = high < 1 or loses
    strength = max(-1, min(1, math.log2(ratio))) if ratio > 0 else -1
    color = plt.get_cmap("RdBu_r")(0.5 + 0.33 * strength) if decided else "#e6e6e6"
    axis.add_patch(plt.Rectangle((x - 0.49, y - 0.49), 0.98, 0.98, color=color))
    verdict = "LOSES" if loses else "wins" if high < 1 else "undecided"
    axis.text(x, y - 0.18, number(ratio), ha="center", va="center", fontsize=17)
    text = (f"[{number(low)}, {number(high)}]  {verdict}\n"
            f"never, of {result['seeds']}: DisBack {result['never']}, VSD {result['vsd_never']}")
    axis.text(x, y + 0.24, text, ha="center", va="center", fontsize=7.5)


def number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


def draw_convergence(grid: study.Grid, lines: Lines) -> plt.Figure | None:
    """(b) Medians of the SWD with intervals over evaluations."""
    cells = [cell for cell in (*study.HALVES, "ring-copy-eps") if cell in grid.arms]
    figure, axes = panels(len(cells))
    for axis, cell in zip(axes, cells):
        for arm in ("vsd", "vsd_tuned", "disback"):
            if arm in grid.arms[cell]:
                band(axis, grid, lines, cell, arm, lambda line: (line["curve"]["kevals"],
                                                                 line["curve"]["swd"]))
        over_evaluations(axis, cell)
    if not any(axis.lines for axis in axes):
        return None
    axes[0].set_ylabel("SWD to the data")
    axes[0].legend(fontsize=8)
    figure.suptitle("Convergence: median of the seeds and its 95% interval")
    return figure


def band(axis: plt.Axes, grid: study.Grid, lines: Lines, cell: str, arm: str, of: Callable,
         **style: object) -> None:
    """The median over seeds of a curve, of(line) = (x, y), with its interval as a band. Runs that
    diverged lack points: a median is drawn where all have one."""
    curves = [of(line) for line in judged(grid, lines, cell, arm)]
    if not curves:
        return
    points = min(len(x) for x, _ in curves)
    middle = np.array([median_interval([y[i] for _, y in curves], 1000) for i in range(points)])
    style = {"color": COLORS[arm], "label": NAMES[arm]} | style
    axis.plot(curves[0][0][:points], middle[:, 0], **style)
    axis.fill_between(curves[0][0][:points], middle[:, 1], middle[:, 2], color=style["color"],
                      alpha=0.2, linewidth=0)


def draw_halves(grid: study.Grid, lines: Lines) -> plt.Figure | None:
    """(c) The exact errors of the teacher and of the fake at the student's samples."""
    cells = [cell for cell in study.HALVES if cell in grid.arms]
    figure, axes = panels(len(cells))
    for axis, cell in zip(axes, cells):
        for arm in study.MAP_ARMS:
            for column, name, dashes in ((1, "teacher's error", "-"), (2, "fake's error", "--")):
                band(axis, grid, lines, cell, arm, lambda line, column=column: (
                    [row[0] for row in line["halves"]], [row[column] for row in line["halves"]]),
                    linestyle=dashes, label=f"{NAMES[arm]}: {name}")
        walks = [line["halves"] for line in judged(grid, lines, cell, "disback")]
        if walks and len(walks[0]) > len(study.EARLY):  # iteration 50 is among the looks, too
            axis.axvline(walks[0][len(study.EARLY)][0], color="black", linestyle=":")
        over_evaluations(axis, cell)
    if not any(axis.lines for axis in axes):
        return None
    axes[0].set_ylabel("mean |D - exact D| / (sigma + 0.5)\nat the student's noised samples")
    axes[0].legend(fontsize=8)
    figure.suptitle("The two halves of the score mismatch, measured against exact scores; right of "
                    "the dotted line DisBack's target is the teacher, left of it a node")
    return figure


def draw_ablation(grid: study.Grid, lines: Lines) -> plt.Figure | None:
    """(d) Final SWD, and evaluations to twice tuned VSD's final SWD, of every arm."""
    cells = [cell for cell, arms in grid.arms.items() if len(arms) > 2 and any(
        compare(grid, lines, cell, arm) for arm in arms)]
    if not cells:
        return None
    figure, axes = plt.subplots(len(cells), 2, figsize=(10.5, 0.6 + 4.2 * len(cells)),
                                layout="constrained", squeeze=False, sharey="row")
    for (left, right), cell in zip(axes, cells):
        arms = [arm for arm in NAMES if compare(grid, lines, cell, arm)]
        ends = [median_interval([study.final_swd(line) for line in judged(grid, lines, cell, arm)])
                for arm in arms]
        shares = [compare(grid, lines, cell, arm, 2.0)["share"] for arm in arms]
        bars(left, arms, ends)
        bars(right, arms, shares)
        left.set(yticks=range(len(arms)), xlabel="final SWD", xscale="log")
        left.set_xlim(0.1, None)
        left.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter("{x:g}")
        left.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        left.set_yticklabels([NAMES[arm] for arm in arms], fontsize=8)
        left.set_title(title(cell), fontsize=10)
        right.set_title("evaluations to twice the final SWD of tuned VSD", fontsize=10)
        right.set_xlabel("share of the budget, stage 1 included")
    figure.suptitle("Ablations, each but the purple with its own tuned rates: medians and 95% "
                    "intervals; less is better")
    return figure


def bars(axis: plt.Axes, arms: list[str], values: list[tuple]) -> None:
    """A bar an arm, first on top; what is never reached is written, not drawn."""
    finite = [v for triple in values for v in triple if math.isfinite(v)]
    edge = 1.15 * max(finite, default=1)
    for y, (arm, (middle, low, high)) in enumerate(zip(arms, values)):
        shown = min(middle, edge)
        axis.barh(y, shown, color=COLORS.get(arm, DATA))
        axis.plot([min(low, edge), min(high, edge)], [y, y], color="black", linewidth=1.2)
        if not math.isfinite(high):
            axis.text(edge, y - 0.3, "never " if math.isinf(middle) else "some never ", ha="right",
                      va="center", fontsize=7)
    axis.set(xlim=(0, edge), ylim=(len(arms) - 0.4, -0.6))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def draw_trade(grid: study.Grid, lines: Lines) -> plt.Figure | None:
    """(e) Interval x nodes: final SWD and evaluations to twice tuned VSD's."""
    cell, nodes, intervals = "poor-8-eps", (1, 3, 10, 30), (3, 10, 33)
    arms = {(n, i): "disback" if (n, i) == (10, 10) else "n1_i10" if n == 1 else f"n{n}_i{i}"
            for n in nodes for i in intervals}
    found = {at: arm for at, arm in arms.items() if judged(grid, lines, cell, arm)}
    if len(found) < 2 or not judged(grid, lines, cell, "vsd_tuned"):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    ends = {at: median_interval([study.final_swd(line) for line in judged(grid, lines, cell, arm)])
            for at, arm in found.items()}
    shares = {at: compare(grid, lines, cell, arm, 2.0)["share"] for at, arm in found.items()}
    vsd = (median_interval([study.final_swd(v) for v in judged(grid, lines, cell, "vsd_tuned")])[0],
           compare(grid, lines, cell, "vsd_tuned", 2.0)["share"][0])
    names = ("final SWD", "evaluations to twice tuned VSD's final SWD,\nas a share of the budget")
    for axis, values, name, base in zip(axes, (ends, shares), names, vsd):
        good = [value[0] for value in values.values() if math.isfinite(value[0])]
        scale = plt.Normalize(min([*good, base]), max([*good, base]))
        for (n, i), value in values.items():
            at = nodes.index(n), intervals.index(i)
            color = plt.get_cmap("YlGnBu")(0.5 * scale(value[0])) if value[0] < 1e9 else "#f2c9c9"
            axis.add_patch(plt.Rectangle((at[0] - 0.49, at[1] - 0.49), 0.98, 0.98, color=color))
            axis.text(*at, f"{short(value[0])}\n[{short(value[1])}, {short(value[2])}]",
                      ha="center", va="center", fontsize=9)
        axis.set_xticks(range(len(nodes)), [f"{n} node{'s' * (n > 1)}" for n in nodes])
        axis.set_yticks(range(len(intervals)), [f"interval {i}" for i in intervals])
        axis.set(xlim=(-0.5, len(nodes) - 0.5), ylim=(-0.5, len(intervals) - 0.5))
        axis.set_title(f"{name} (tuned VSD: {short(base)})", fontsize=10)
    figure.suptitle(f"Nodes and interval, {title(cell)}; light is better\n1 node: there is no "
                    "target between at which to stay; blank: longer than the budget", fontsize=11)
    return figure


def short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "never"


def draw_rates(grid: study.Grid, lines: Lines) -> plt.Figure | None:
    """(f) Final SWD over the learning rate: of all seeds where all rates have them, else of those
    of the tuning."""
    cells = [cell for cell in (*study.HALVES, "ring-copy-eps") if cell in grid.arms]
    figure, axes = panels(len(cells))
    for axis, cell in zip(axes, cells):
        for arm in study.MAP_ARMS:
            seeds = grid.seeds if cell in grid.swept else grid.tuning
            equal = [(rates[0], [study.final_swd(lines[key]) for seed in seeds
                                 if (key := (cell, arm, seed, rates)) in lines])
                     for rates in grid.rates if rates[0] == rates[1]]
            equal = [(rate, ends) for rate, ends in equal if ends]
            axis.plot([rate for rate, _ in equal], [np.median(ends) for _, ends in equal],
                      color=COLORS[arm], label="DisBack" if arm == "disback" else "VSD")
            for rate, ends in equal:
                axis.plot([rate] * len(ends), ends, ".", color=COLORS[arm], alpha=0.6)
        axis.set(xscale="log", yscale="log", xlabel="learning rate of student and fake")
        axis.set_title(title(cell), fontsize=10)
        readable(axis)
        ticks = sorted({rates[0] for rates in grid.rates})
        axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axis.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
    if not any(axis.lines for axis in axes):
        return None
    axes[0].set_ylabel("final SWD")
    axes[0].legend(fontsize=8)
    figure.suptitle("Sensitivity to the learning rate: the median run, and each of them\n"
                    "(ten seeds on the left, the three tuning seeds on the right)")
    return figure


def panels(n: int) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    """n panels, at most 3 a row."""
    columns = 2 if n == 4 else max(n, 1)
    rows = max(n, 1) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(1 + 4.2 * columns, 0.4 + 3.7 * rows),
                                squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def over_evaluations(axis: plt.Axes, cell: str) -> None:
    axis.set(yscale="log", xlabel="network evaluations, thousands (stage 1 included)")
    axis.set_title(title(cell), fontsize=10)
    readable(axis)


def title(cell: str) -> str:
    """A cell in words."""
    data, start, weighting = cell.split("-")
    start = "the teacher's copy" if start == "copy" else f"start at distance {start}"
    data = {"poor": "ring, teacher of 300 steps", "short": "ring, half the budget"}.get(data, data)
    return f"{data},\n{start}, weighting {weighting}"
