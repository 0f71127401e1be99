"""The table of the methods whose world is the plane."""

import importlib
import statistics


def spread(values: list[float], digits: int = 3) -> str:
    """Median, least and most, and how many."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}; {len(values)})"


def of(lines: list[dict], name: str) -> list[float]:
    return [line[name] if name in line else line["numbers"][name] for line in lines]


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
