"""table.md and gallery.png, from the lines alone."""

import importlib
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file

from runtime import files
from runtime.plots import DATA, STUDENT, TARGET, plt, save
from toy2d import metrics, mixture

BEGIN, END = "<!-- the table -->", "<!-- its end -->"
HEADING = """Seed 0.  Grey: data.  Blue: samples of the student.  Orange: the same, backtracked.
In brackets: where the student starts (off: untrained, far from the data; copy: as the teacher)
and where the teacher is asked (S: at noised samples of the student; P: at the student's guess
of a trajectory; X: at noised data; J: on the teacher's own trajectories)"""


def write(out: Path, lines: list[dict], methods: tuple[str, ...]) -> None:
    """Both files, of all the lines there are; methods without one are left out."""
    done = [name for name in methods if any(line["method"] == name for line in lines)]
    rows = {}  # the lines of a row by (method, variant, backtrack, rate), in the order of seeds
    for line in sorted(lines, key=lambda line: line["seed"]):
        key = tuple(line[name] for name in ("method", "variant", "backtrack", "rate"))
        rows.setdefault(key, []).append(line)
    text = "\n".join([*reference(rows), "", *plane(rows, done), "", *analogues(rows, done), ""])
    files.atomically(out / "table.md", lambda beside: beside.write_text(text))
    if (page := out / "README.md").exists():  # the committed lines' own page shows the table
        before, _, rest = page.read_text().partition(BEGIN)
        whole = before + BEGIN + "\n\n" + text + "\n" + END + rest.partition(END)[2]
        files.atomically(page, lambda beside: beside.write_text(whole))
    draw(out, rows, methods)


def spread(values: list[float], digits: int = 3) -> str:
    """Median, least and most, and how many."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}; {len(values)})"


def of(lines: list[dict], name: str) -> list[float]:
    return [line[name] if name in line else line["numbers"][name] for line in lines]


def reference(rows: dict) -> list[str]:
    """What the numbers are to be compared with."""
    data = mixture.ring()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        evaluate = metrics.Evaluation(data)
        floors = [evaluate.of(data.sample(evaluate.samples))["swd"] for _ in range(20)]
    found = [f"another set of data: SWD {spread(floors)}"]
    for line in rows.get(("instaflow", "", False, 1), ())[:1]:
        found += [f"{name}: SWD {value:.3f}" for name, value in line["numbers"].items()
                  if name.startswith("the teacher")]
    return [f"- {text}" for text in found]


def plane(rows: dict, methods: list[str]) -> list[str]:
    """A row for every method whose world is the plane, and one for each of its variants."""
    table = ["Of the SWD: median (least to most; number of seeds). Other columns are medians.", "",
             "| method | start | teacher asked at | steps | SWD | mode TV | off-mode | evals, M | "
             "backtracked: SWD | evals, M | wins | plain at twice the rates: SWD |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for method in methods:
        module = importlib.import_module(f"toy2d.gallery.{method}")
        if hasattr(module, "CLAIM"):
            continue
        for variant in ("", *getattr(module, "VARIANTS", ())):
            lines = rows.get((method, variant, False, 1))
            if lines:
                name = module.NAME if not variant else f"… {variant}"
                start = "copy" if variant == "from the copy" else module.START
                cells = [name, start, module.QUERIES, str(module.STEPS), *numbers(lines)]
                cells += walked(rows, method, lines) if not variant else 4 * [""]
                table.append(f"| {' | '.join(cells)} |")
    return table


def numbers(lines: list[dict]) -> list[str]:
    return [spread(of(lines, "swd")),
            *(f"{statistics.median(of(lines, name)):.2f}" for name in ("mode_tv", "off_mode")),
            f"{statistics.median(of(lines, 'evals')) / 1e6:.1f}"]


def walked(rows: dict, method: str, plain: list[dict]) -> list[str]:
    """The cells of the other two arms; a win is a lower SWD on the same seed."""
    back, double = rows.get((method, "", True, 1)), rows.get((method, "", False, 2))
    if not back:
        return 4 * [""]
    theirs = {line["seed"]: line["swd"] for line in plain}
    pairs = [line["swd"] < theirs[line["seed"]] for line in back if line["seed"] in theirs]
    return [spread(of(back, "swd")), f"{statistics.median(of(back, 'evals')) / 1e6:.1f}",
            f"{sum(pairs)} of {len(pairs)}", spread(of(double, "swd")) if double else ""]


def analogues(rows: dict, methods: list[str]) -> list[str]:
    """The methods whose world is not a point cloud."""
    table = ["| analogue | claim: without → with (check) | without | with | check |",
             "|---|---|---|---|---|"]
    for method in methods:
        module = importlib.import_module(f"toy2d.gallery.{method}")
        if not hasattr(module, "CLAIM"):
            continue
        for back, rate in ((False, 1), (True, 1), (False, 2)):
            if lines := rows.get((method, "", back, rate)):
                arm = ", backtracked" * back + ", twice the rate" * (rate == 2)
                cells = [module.NAME + arm, module.CLAIM]
                cells += [spread(of(lines, name)) for name in ("without", "with", "check")]
                table.append(f"| {' | '.join(cells)} |")
    return table


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
            clouds(axis, out, rows, method, points)
    save(figure, out / "gallery.png")


def clouds(axis: plt.Axes, out: Path, rows: dict, method: str, points: torch.Tensor) -> None:
    axis.set(xlim=(-3.3, 9.9), ylim=(-4.3, 3.3), xticks=[], yticks=[], aspect="equal")
    for left, back, color in ((0.0, False, STUDENT), (6.6, True, TARGET)):
        lines = rows.get((method, "", back, 1), [{"seed": None}])
        if lines[0]["seed"] == 0:
            cloud = load_file(out / "clouds" / f"{method}{back * '-backtrack'}.safetensors")["x"]
            for x, paint, size in ((points, DATA, 1), (cloud, color, 0.8)):
                axis.plot(x[:, 0] + left, x[:, 1], ".", color=paint, markersize=size)
            axis.text(left, -4, f"SWD {lines[0]['swd']:.2f}", fontsize=8, ha="center")
        else:
            axis.text(left, 0, "not defined", fontsize=8, ha="center", color="#808080")


def first(rows: dict, method: str, back: bool = False) -> dict:
    return rows[method, "", back, 1][0]["numbers"]


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
    found = load_file(out / "clouds" / "pvd.safetensors")
    both = [found[name].view(48, 48).T for name in ("from rays", "distilled")]
    axis.imshow(torch.cat(both, dim=1), origin="lower", cmap="magma", vmax=found["distilled"].max())
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
