"""Nineteen ways to one step. METHOD runs one of them and prints its line; `all` runs what the
lines lack; then, as `table` does, it writes table.md and gallery.png from the lines alone."""

import functools
import importlib
import json
import math
import os
from pathlib import Path

from disback import Refusal
from runtime import command, files, workers
from runtime.study import appending
from toy2d.gallery import conditional, report
from toy2d.gallery.core import Toy
from toy2d.gallery.runs import METHODS, arms, execute, read
from toy2d.gallery.versions import fresh

ROOM = 10**7  # bytes; lines, clouds and figures have one million


def main(argv: list[str]) -> None:
    parser = command.parser("python -m toy2d.gallery", __doc__)
    parser.add_argument("method", choices=(*METHODS, "all", "table"), metavar="METHOD",
                        help=" | ".join((*METHODS, "all", "table")))
    parser.add_argument("--variant", default="", metavar="NAME", help="another row of a method")
    arm = parser.add_mutually_exclusive_group()
    arm.add_argument("--backtrack", action="store_true", help="the target walks; the plain row has "
                     "as many evaluations")
    arm.add_argument("--double", action="store_true", help="plain, at twice the learning rates")
    parser.add_argument("--seed", type=int, default=0, help="of one run (0)")
    parser.add_argument("--seeds", type=int, default=5, help="of `all`, from 0 on (5)")
    parser.add_argument("--jobs", type=command.count, default=os.cpu_count(),
                        help="processes (all cores)")
    parser.add_argument("--out", type=command.path, default=Path("runs/gallery"),
                        help="folder of lines (runs/gallery)")
    args = parser.parse_args(argv)
    if not (0 <= args.seed < 2**63 and 1 <= args.seeds < 1000):
        command.refuse("--seed must be at least 0 and below 2**63, --seeds from 1 to 999")
    one_run, file = args.method in METHODS, args.out / "lines.jsonl"
    if not one_run and (args.variant or args.backtrack or args.double or args.seed):
        command.refuse("--variant, --backtrack, --double and --seed are of one METHOD")
    if args.method != "all" and args.seeds != parser.get_default("seeds"):
        command.refuse("--seeds is of `all`: --seed names that of one run")
    for name in ("table.md", "gallery.png", "clouds"):
        if (args.out / name).exists() and not file.exists():
            raise Refusal(f"{args.out / name} is of no gallery, as {file} is missing: name another "
                          "--out")
    read(file)  # refuses those of another kind
    for place in (args.out, args.out / "clouds"):
        files.must_take_files(place, "--out", ROOM)
    if one_run:
        arm = args.variant, args.backtrack, 2 if args.double else 1
        if arm not in arms(args.method):
            rows = sorted({name for name, *_ in arms(args.method)} - {""})
            command.refuse(f"{args.method} has no such row: --backtrack and --double are where "
                           f"its target can walk; its variants: {', '.join(rows) or 'none'}")
        with appending(file) as append:
            line = execute(args.out, (args.method, *arm, args.seed))
            append(line)
        print(json.dumps(line))
        return
    if args.method == "all":
        run_all(args.out, file, args.seeds, args.jobs)
    report.write(args.out, report_lines(file), METHODS)


def run_all(out: Path, file: Path, seeds: int, jobs: int) -> None:
    """Run what has no line of the present code, seed by seed."""
    with appending(file) as append:
        conditional.teacher(Toy(0))  # both teachers, before the workers ask for them
        lines = read(file)
        keys = [(method, *arm, seed) for seed in range(seeds) for method in METHODS
                for arm in arms(method)]
        keys.sort(key=lambda key: key[1] != "")  # variants last
        todo = [key for key in keys if not fresh(lines.get(key))]
        workers.work(functools.partial(execute, out), todo, jobs, append)


def report_lines(file: Path) -> list[dict]:
    """All lines of the present code; a run that has none but of another version is refused, and a
    number that is missing or not finite."""
    lines = read(file).values()
    stale = sorted({line["method"] for line in lines if not fresh(line)})
    if stale or not lines:
        raise Refusal(f"{file} has no lines of this version" + (f" of {', '.join(stale)}: " if stale
                      else ": ") + f"python -m toy2d.gallery all --out {file.parent} makes them")
    for line in lines:
        with files.blame(f"{file}: a line of {line['method']}, seed {line['seed']}, is of no use: "
                         "remove it, and `all` makes it again"):
            analogue = hasattr(importlib.import_module(f"toy2d.gallery.{line['method']}"), "CLAIM")
            found = [line[name] for name in ("swd", "mode_tv", "off_mode") if not analogue]
            if not math.isfinite(sum([line["evals"], *line["numbers"].values(), *found])):
                raise ValueError("not finite")
    return list(lines)


if __name__ == "__main__":
    command.run(main)
