"""The study's statistics and figures, from its lines alone; README.md beside this file reads them.

A run arrives if it ends at an SWD of at most 0.5. Shares of runs have Wilson's 95% intervals,
medians bootstrapped ones.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from runtime import files
from runtime.plots import DATA, OTHER, STUDENT, TARGET, plt, readable, save
from runtime.study import first_reach, median_interval, paired_ratio
from toy2d.study_runs import SHARES

ARRIVED, LEVEL = 0.5, 0.3  # SWD
COLORS = {"vsd": OTHER, "disback": STUDENT, "degraded fake": TARGET, "vsd k2": "#2c8c5a",
          "disback k2": "#5aa0dc"}
NAMES = {"vsd": "VSD", "disback": "DisBack", "degraded fake": "degraded fake alone",
         "vsd k2": "VSD, k = 2", "disback k2": "DisBack, k = 2"}
Lines = dict[tuple, dict]


def end(run: dict) -> float:
    """The SWD at the end; infinite for a run that diverged."""
    return math.inf if run["final"]["swd"] is None else run["final"]["swd"]


def rates_of(lines: Lines, cell: str, arm: str) -> list[tuple[float, float]]:
    return sorted({key[3] for key in lines if key[:2] == (cell, arm)})


def of(lines: Lines, cell: str, arm: str, rates: tuple) -> dict[int, dict]:
    """The runs by seed."""
    return {key[2]: run for key, run in sorted(lines.items())
            if key[:2] == (cell, arm) and key[3] == rates}


def arrived(runs: dict[int, dict]) -> tuple[float, float, float]:
    """The share of runs that arrive, and its interval."""
    count = sum(end(run) <= ARRIVED for run in runs.values())
    interval = binomtest(count, len(runs)).proportion_ci(method="wilson")
    return count / len(runs), float(interval.low), float(interval.high)


def cost(run: dict) -> float:
    """The share of the budget, stage 1 included, after which the SWD is first at LEVEL."""
    at = [run["stage1"] + (1 - run["stage1"]) * share for share in SHARES]
    return first_reach(at, [1e9 if value is None else value for value in run["swd"]], LEVEL)


def costs(lines: Lines, cell: str, arm: str) -> dict[int, float]:
    """By seed the cost at the arm's best rate, which is chosen on the seeds of the other half: that
    with the least median cost, and among those that never get there the least median end."""
    found = {rates: of(lines, cell, arm, rates) for rates in rates_of(lines, cell, arm)}
    judged = {}
    for half in (0, 1):
        def rank(rates: tuple, half: int = half) -> tuple[float, float]:
            others = [run for seed, run in found[rates].items() if seed % 2 != half]
            return (float(np.median([cost(run) for run in others] or [math.inf])),
                    float(np.median([end(run) for run in others] or [math.inf])))
        best = min(found, key=rank)
        judged |= {seed: cost(run) for seed, run in found[best].items() if seed % 2 == half}
    return judged


def ratio(lines: Lines, cell: str, arm: str) -> tuple[float, float, float] | None:
    """An arm's cost over plain VSD's, both at their best rates: the median of paired seeds."""
    if not all(rates_of(lines, cell, name) for name in (arm, "vsd")):
        return None
    return paired(costs(lines, cell, arm), costs(lines, cell, "vsd"))


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float] | None:
    """The median ratio of costs by seed, and its interval."""
    pairs = [paired_ratio(ours[seed], theirs[seed], 1.0) for seed in sorted(ours.keys() & theirs)]
    return median_interval(pairs) if pairs else None


def summary(lines: Lines) -> list[dict]:
    """Of every cell, arm and pair of rates, with intervals: the share that arrives, the medians of
    the ends, the costs, and the costs over plain VSD's at the same rates, paired."""
    rows = []
    for cell, arm, rates in dict.fromkeys((key[0], key[1], key[3]) for key in sorted(lines)):
        runs, vsd = of(lines, cell, arm, rates), of(lines, cell, "vsd", rates)
        found, theirs = ({seed: cost(run) for seed, run in one.items()} for one in (runs, vsd))
        rows.append({"cell": cell, "arm": arm, "rates": rates, "runs": len(runs),
                     "arrived": arrived(runs), "swd": median_interval([*map(end, runs.values())]),
                     "cost": median_interval([*found.values()]), "ratio": paired(found, theirs)})
    return rows


def draw(out: Path, lines: Lines, fresh: tuple[int, ...]) -> None:
    """Write the figures and summary.json to `out`; what has no lines yet is left out."""
    lines = dict(sorted(lines.items()))  # processes end in any order
    judged = {key: run for key, run in lines.items() if key[2] not in fresh}
    rows = {"seeds": summary(judged), "fresh seeds": summary(
        {key: run for key, run in lines.items() if key[2] in fresh})}
    text = json.dumps(rows).replace("Infinity", '"never"').replace('{"cell"', '\n{"cell"')
    files.atomically(out / "summary.json", lambda file: file.write_text(text + "\n"))
    both = cells_of(judged, "vsd", "disback")
    watched = [cell for cell in both if any("spread" in run for key, run in judged.items()
                                            if key[0] == cell)]
    plane = [cell for cell in both if cell[0].isdigit() and cell.count(" ") == 1]
    wide = [cell for cell in both if len(common(judged, cell)) > 1]
    for name, figure, cells, least in (
            ("window", draw_window, wide, 1), ("mechanism", draw_mechanism, watched, 1),
            ("cost", draw_cost, both, 1), ("map", draw_map, plane, 3),
            ("ablations", draw_ablations, cells_of(judged, "disback", "forward"), 1)):
        if len(cells) >= least:
            save(figure(judged, cells), out / f"{name}.png")


def cells_of(lines: Lines, *arms: str) -> list[str]:
    """Cells with lines of all these arms."""
    found = {key[:2] for key in lines}
    return [cell for cell in dict.fromkeys(key[0] for key in lines)
            if all((cell, arm) in found for arm in arms)]


def panels(count: int, height: float = 3.4) -> tuple[plt.Figure, list[plt.Axes]]:
    columns, rows = min(count, 3), math.ceil(count / 3)
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharey=True, layout="constrained",
                                figsize=(2.4 + 3.6 * columns, 1 + height * rows))
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def draw_window(lines: Lines, cells: list[str]) -> plt.Figure:
    """(a) The share of runs that arrive, over the learning rate."""
    figure, axes = panels(len(cells))
    for axis, cell in zip(axes, cells):
        for i, arm in enumerate(NAMES):
            alike = [rates for rates in rates_of(lines, cell, arm) if rates[0] == rates[1]]
            if alike:
                at = [rates[0] * 1.05**(i - 1) for rates in alike]  # beside each other
                shares = [arrived(of(lines, cell, arm, rates)) for rates in alike]
                with_interval(axis, at, shares, arm)
        seeds = len({key[2] for key in lines if key[0] == cell})
        axis.set(title=f"{cell}: {seeds} seeds", xscale="log", ylim=(-0.03, 1.03),
                 xlabel="learning rate of student and fake")
        ticks = sorted({key[3][0] for key in lines if key[0] == cell})
        axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"share of runs that end at SWD ≤ {ARRIVED}")
    drawn = {label: bars for axis in axes for bars, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(drawn.values(), drawn, loc="outside upper center",
                  ncols=min(5, 1 + 2 * len(cells)))
    return figure


def with_interval(axis: plt.Axes, at: list[float], found: list[tuple], arm: str) -> None:
    """(value, low, high) as points with bars."""
    middle, low, high = np.transpose(found)
    axis.errorbar(at, middle, [middle - low, high - middle], color=COLORS[arm], capsize=3,
                  marker="o", label=NAMES[arm])


def draw_mechanism(lines: Lines, cells: list[str]) -> plt.Figure:
    """(b) What happens on the way: medians of the seeds, and their quartiles as bands, at the rates
    at which VSD and DisBack differ most in the share that arrives."""
    rows = {"spread": "spread ÷ the data's", "bias": "fake's bias", "teacher": "teacher's error",
            "swd": "SWD"}
    figure, axes = plt.subplots(len(rows), len(cells), figsize=(1 + 4.2 * len(cells), 9),
                                sharex=True, sharey="row", squeeze=False, layout="constrained")
    for column, cell in zip(axes.T, cells):
        rates = max(common(lines, cell), key=lambda rates: abs(
            arrived(of(lines, cell, "vsd", rates))[0]
            - arrived(of(lines, cell, "disback", rates))[0]))
        column[0].set_title(f"{cell}, rates {rates[0]:g}")
        for axis, name in zip(column, rows):
            for arm in NAMES:
                band(axis, of(lines, cell, arm, rates), name, arm)
            axis.set(xscale="log", yscale="log" if name == "swd" else "linear")
            axis.grid(alpha=0.25)
        column[-1].set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["1%", "3%", "10%", "30%", "100%"])
        column[-1].set_xlabel("of the budget, stage 1 included")
    for axis, label in zip(axes[:, 0], rows.values()):
        axis.set_ylabel(label)
    for axis in axes[-1]:
        readable(axis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def band(axis: plt.Axes, runs: dict[int, dict], name: str, arm: str) -> None:
    if not runs:
        return
    curves = np.array([run[name] for run in runs.values()], float)  # None becomes nan
    stage1 = next(iter(runs.values()))["stage1"]
    at = [stage1 + (1 - stage1) * share for share in SHARES]
    low, middle, high = np.nanquantile(curves, [0.25, 0.5, 0.75], axis=0)
    axis.fill_between(at, low, high, color=COLORS[arm], alpha=0.15, linewidth=0)
    axis.plot(at, middle, color=COLORS[arm], label=NAMES[arm])


def draw_cost(lines: Lines, cells: list[str]) -> plt.Figure:
    """(c) Each arm's evaluations to LEVEL at its best rate over plain VSD's at its own."""
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.6 * len(cells)), layout="constrained")
    for j, arm in enumerate(list(NAMES)[1:]):
        found = {i: ratio(lines, cell, arm) for i, cell in enumerate(cells)}
        for i, values in found.items():
            if values:
                middle, low, high = np.minimum(values, 3)
                axis.errorbar(middle, i + 0.15 * (j - 1.5), color=COLORS[arm], marker="o",
                              xerr=[[middle - low], [high - middle]], capsize=3)
        axis.plot([], color=COLORS[arm], label=NAMES[arm])
    axis.axvline(1, color=DATA)
    axis.set_yticks(range(len(cells)), cells)
    axis.set(xlabel=f"evaluations to SWD {LEVEL} ÷ plain VSD's, both at their best rates "
             "(3: or more)", xlim=(0, 3.05), ylim=(len(cells) - 0.5, -0.5))
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def draw_ablations(lines: Lines, cells: list[str]) -> plt.Figure:
    """(d) The share of runs that arrive, of all rates that the controls have together."""
    others = {key[1] for key in lines if key[0] in cells} - NAMES.keys()
    arms = [*NAMES, *sorted(others)]
    figure, axes = panels(len(cells), 0.32 * len(arms))
    for axis, cell in zip(axes, cells):
        for i, arm in enumerate(arms):
            runs = pooled(lines, cell, arm, rates_of(lines, cell, "forward"))
            if runs:
                share, low, high = arrived(runs)
                axis.errorbar(share, i, xerr=[[share - low], [high - share]], marker="o",
                              color=COLORS.get(arm, "#606060"), capsize=3)
        axis.set_yticks(range(len(arms)), [NAMES.get(arm, arm) for arm in arms])
        axis.set(title=cell, xlabel=f"share of runs that end at SWD ≤ {ARRIVED}", xlim=(0, 1.03))
        axis.grid(alpha=0.25)
    axes[0].invert_yaxis()
    return figure


def draw_map(lines: Lines, cells: list[str]) -> plt.Figure:
    """(e) Over dimensions and distance: who arrives more often, at the rates that both arms have;
    and who is cheaper at the best rates."""
    rows, columns = (sorted({cell.split()[i] for cell in cells}, key=lambda name: int(
        name.strip("dD"))) for i in (0, 1))
    figure, axis = plt.subplots(figsize=(1.5 + 2.4 * len(columns), 1 + 1.3 * len(rows)),
                                layout="constrained")
    for cell in cells:
        y, x = (names.index(name) for names, name in zip((rows, columns), cell.split()))
        vsd, disback = (arrived(pooled(lines, cell, arm, common(lines, cell)))[0]
                        for arm in ("vsd", "disback"))
        color = plt.get_cmap("RdBu")(0.5 + 0.4 * (disback - vsd))
        axis.add_patch(plt.Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=color))
        middle, low, high = ratio(lines, cell, "disback")
        axis.text(x, y, f"VSD arrives {vsd:.0%}\nDisBack {disback:.0%}\n"
                  f"cost × {middle:.2f} [{low:.2f}, {high:.2f}]", ha="center", va="center",
                  fontsize=9)
    axis.set_xticks(range(len(columns)), [f"distance {name[1:]}" for name in columns])
    axis.set_yticks(range(len(rows)), [f"{name[:-1]} dimensions" for name in rows])
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    return figure


def common(lines: Lines, cell: str) -> list[tuple[float, float]]:
    """The rates that VSD and DisBack have both."""
    disback = rates_of(lines, cell, "disback")
    return [rates for rates in rates_of(lines, cell, "vsd") if rates in disback]


def pooled(lines: Lines, cell: str, arm: str, rates: list[tuple]) -> dict[int, dict]:
    """The runs at all these rates together."""
    return dict(enumerate(run for pair in rates for run in of(lines, cell, arm, pair).values()))
