"""table.md and gallery.png, from the lines alone."""

import importlib
from pathlib import Path

import torch

from runtime import files
from toy2d import metrics, mixture
from toy2d.gallery.pictures import draw
from toy2d.gallery.table import of, plane, spread

BEGIN, END = "<!-- the table -->", "<!-- its end -->"


def write(out: Path, lines: list[dict], methods: tuple[str, ...]) -> None:
    """Both files, of all the lines there are; methods without one are left out."""
    done = [name for name in methods if any(line["method"] == name for line in lines)]
    rows = {}  # the lines of a row by (method, variant, backtrack, rate), in the order of seeds
    for line in sorted(lines, key=lambda line: line["seed"]):
        key = tuple(line[name] for name in ("method", "variant", "backtrack", "rate"))
        rows.setdefault(key, []).append(line)
    text = "\n".join([*reference(rows), "", *plane(rows, done), "", *analogues(rows, done), ""])
    files.atomically(out / "table.md", lambda beside: beside.write_text(text, "utf-8"))
    show(out / "README.md", text)
    draw(out, rows, methods)


def show(page: Path, table: str) -> None:
    """Put the table between the marks of the committed lines' own page; another is left alone."""
    held = page.read_text("utf-8", "surrogateescape") if page.exists() else ""
    before, _, rest = held.partition(BEGIN)
    if END in rest and not page.is_symlink():
        whole = before + BEGIN + "\n\n" + table + "\n" + END + rest.partition(END)[2]
        files.atomically(page, lambda beside: beside.write_text(whole, "utf-8", "surrogateescape"))


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
