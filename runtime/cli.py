"""The command line of a stage, out of a problem's presets."""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from disback import Refusal
from runtime import command, ranks
from runtime.folder import enter, writes
from runtime.interface import Config, Problem, flag_of


def start(stage: str, doc: str, argv: Sequence[str], **flags: dict) -> tuple[Any, Problem]:
    """Read the command line and make the problem that it names; `flags` are the stage's own."""
    args, module = parse(stage, doc, argv, flags)
    ranks.join_ranks()
    args.writes = writes(stage, getattr(module, "WRITES", ()))
    enter(stage, args)
    return args, make(args, module.make)


def make(args: Any, make: Callable) -> Problem:
    """The problem, the first rank first, with what names it; then the seed is the run's."""
    count = ranks.world_size() * args.accumulate
    if args.config.batch % count:
        raise Refusal(f"--batch {args.config.batch} must be divisible by {count}, the ranks times "
                      "--accumulate: change one of the three")
    with ranks.first_rank_first():
        problem = make(args.config, args.seed, ranks.device())
    torch.manual_seed(args.seed)  # again: a teacher that was trained and one that was found differ
    about = {"problem": args.problem, "preset": args.preset, "seed": args.seed} | problem.about
    return dataclasses.replace(problem, about=json.loads(json.dumps(about)))  # as files have it


def parse(stage: str, doc: str, argv: Sequence[str], flags: dict) -> tuple[Any, Any]:
    """The arguments, with the problem's settings as `config`, and the problem's module."""
    problems = sorted(file.parent.name for file in Path(__file__).parents[1].glob("*/problem.py"))
    argv = [w.rstrip("/") if w.rstrip("/") in problems else w for w in argv]  # of a shell's toy2d/
    parser = command.parser(f"{stage}.py", doc,
                            epilog="PROBLEM --help lists the problem's flags as well.")
    parser.add_argument("problem", choices=problems, metavar="PROBLEM", help=" | ".join(problems))
    add_common(parser)
    for name, keywords in flags.items():
        parser.add_argument("--" + name.replace("_", "-"), **keywords)
    if name := next((word for word in argv if word in problems), None):
        module = importlib.import_module(f"{name}.problem")
        add_settings(parser, stage, module.PRESETS, named_preset(argv))
        parser.set_defaults(out=Path("runs", name))
        if hasattr(module, "dry_run"):
            parser.add_argument("--dry-run", action="store_true", help="only print what it needs")
    args = parser.parse_args(argv)
    if args.problem != name:
        command.refuse(f"name the problem first: {stage}.py {args.problem} ...")
    changes = {key.removeprefix("config."): value
               for key, value in vars(args).items() if key.startswith("config.")}
    args.config = dataclasses.replace(module.PRESETS[args.preset], **changes)
    command.check_common(args, stage)
    if getattr(args, "dry_run", False):
        print(module.dry_run(args.config))
        if args.accumulate > 1:  # a pass after the first meets the gradients of those before
            print(f"note: --accumulate {args.accumulate} is not counted: it takes less")
        sys.exit()
    return args, module


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags of both stages on every problem."""
    parser.add_argument("--out", type=command.path, help="run folder (default: runs/PROBLEM)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    folder.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="split each batch "
                        "over N backward passes, which takes less memory (default: 1)")
    parser.add_argument("--shard", action="store_true",
                        help="spread weights and optimizers over torchrun's ranks (FSDP2)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        default=torch.cuda.is_available(), help="(default: on a GPU)")


def named_preset(argv: Sequence[str]) -> str | None:
    """The preset that --help shall show."""
    parser = command.parser("", "", add_help=False)
    parser.add_argument("--preset")
    return parser.parse_known_args(argv)[0].preset


def add_settings(parser: argparse.ArgumentParser, stage: str, presets: dict[str, Config],
                 named: str | None) -> None:
    """The presets, and a flag for each setting that this stage has, explained by the field's own
    text. Both take the path's nodes and interval, so that one set of flags can serve for both."""
    shown = named if named in presets else next(iter(presets))
    group = parser.add_argument_group("the problem's flags", f"in brackets: preset {shown}")
    group.add_argument("--preset", default=next(iter(presets)), choices=presets,
                       help="sets the flags below")
    for field in dataclasses.fields(presets[shown]):
        if field.metadata["stage"] not in ("", stage) and field.name not in ("nodes", "interval"):
            continue
        group.add_argument(flag_of(field.name), dest=f"config.{field.name}",
                           type=field.type if field.type in (int, float) else command.home,
                           metavar="|".join(get_args(field.type)) or field.type.__name__.upper(),
                           help=f"{field.metadata['help']} ({getattr(presets[shown], field.name)})",
                           default=argparse.SUPPRESS)
