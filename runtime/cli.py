"""The command line of a stage, out of a problem's presets; mistakes end in one line."""

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from disback import Refusal
from runtime import files, ranks
from runtime.interface import Config, Problem, flag_of


def run(main: Callable[[list[str]], None]) -> None:
    """Run a command; a Refusal, a failing disk or too little memory ends it in a line, status 2."""
    try:
        if any("\udc80" <= letter <= "\udcff" for letter in "".join(sys.argv)):  # bytes, to Python
            raise Refusal(f"an argument is not UTF-8: {ascii(sys.argv[1:])}")
        main(sys.argv[1:])
    except Exception as error:
        full = files.out_of_memory(error)
        if not (full or isinstance(error, (Refusal, OSError))):
            raise
        who = f"error on rank {ranks.rank()}:" if dist.is_initialized() else "error:"
        hint = "(lower --batch, or raise --accumulate)" if full else ""
        print(who, *str(error).split(), hint, file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse(message: str) -> None:
    raise Refusal(f"{message} (--help lists what there is)")


def start(stage: str, doc: str, argv: Sequence[str], **flags: dict) -> tuple[Any, Problem]:
    """Read the command line and make the problem that it names; `flags` are the stage's own."""
    args, module = parse(stage, doc, argv, flags)
    ranks.join_ranks()
    count = ranks.world_size() * args.accumulate
    if args.config.batch % count:
        raise Refusal(f"--batch {args.config.batch} must be divisible by {count}, the ranks times "
                      "--accumulate: change one of the three")
    return args, make(args, module.make)


def make(args: Any, make: Callable) -> Problem:
    """The problem, the first rank first, with what names it; then the seed is the run's."""
    with ranks.first_rank_first():
        problem = make(args.config, args.seed, ranks.device())
    torch.manual_seed(args.seed)  # again: a teacher that was trained and one that was found differ
    about = {"problem": args.problem, "preset": args.preset, "seed": args.seed} | problem.about
    return dataclasses.replace(problem, about=about)


def parse(stage: str, doc: str, argv: Sequence[str], flags: dict) -> tuple[Any, Any]:
    """The arguments, with the problem's settings as `config`, and the problem's module."""
    problems = sorted(file.parent.name for file in
                      Path(__file__).parent.parent.glob("*/problem.py"))
    parser = argparse.ArgumentParser(f"{stage}.py", description=doc, allow_abbrev=False,
                                     epilog="PROBLEM --help lists the problem's flags as well.")
    parser.error = refuse
    parser.add_argument("problem", choices=problems, metavar="PROBLEM", help=" | ".join(problems))
    add_common(parser)
    for name, keywords in flags.items():
        parser.add_argument("--" + name.replace("_", "-"), **keywords)
    name = next((word for word in argv if word in problems), None)
    if name:
        module = importlib.import_module(f"{name}.problem")
        add_settings(parser, stage, module.PRESETS)
        parser.set_defaults(out=Path("runs", name))
        if hasattr(module, "dry_run"):
            parser.add_argument("--dry-run", action="store_true", help="only print what it needs")
    args = parser.parse_args(argv)
    if args.problem != name:
        refuse(f"name the problem first: {stage}.py {args.problem} ...")
    check_common(args)
    changes = {key[7:]: value for key, value in vars(args).items() if key.startswith("config.")}
    args.config = dataclasses.replace(module.PRESETS[args.preset], **changes)
    if getattr(args, "dry_run", False):
        print(module.dry_run(args.config))
        sys.exit()
    return args, module


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags of both stages on every problem."""
    parser.add_argument("--out", type=Path, help="run folder (default: runs/PROBLEM)")
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


def check_common(args: Any) -> None:
    """Refuse numbers out of range, and shards without ranks."""
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    if args.accumulate < 1:
        refuse(f"--accumulate must be at least 1, not {args.accumulate}")
    if args.shard and "RANK" not in os.environ:
        refuse("--shard spreads over ranks: torchrun --nproc_per_node=N starts them")


def add_settings(parser: argparse.ArgumentParser, stage: str, presets: dict[str, Config]) -> None:
    """The presets, and a flag for each setting, explained by the field's own text."""
    preset, config = next(iter(presets.items()))
    group = parser.add_argument_group("the problem's flags", f"in brackets: preset {preset}")
    group.add_argument("--preset", default=preset, choices=presets, help="sets the flags below")
    other = {"degrade": "backtrack_steps", "backtrack": "degrade_steps"}[stage]
    for field in dataclasses.fields(config):
        if field.name == other or not field.metadata["flag"]:
            continue
        kind = field.type if field.type in (int, float) else str
        group.add_argument(flag_of(field.name), dest=f"config.{field.name}", type=kind,
                           metavar="|".join(get_args(field.type)) or kind.__name__.upper(),
                           help=f"{field.metadata['help']} ({getattr(config, field.name)})",
                           default=argparse.SUPPRESS)
