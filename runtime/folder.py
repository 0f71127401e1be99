"""The folder of a run, and whether a path or a checkpoint is of the same flags."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from disback import DegradationPath, Refusal
from runtime import files, ranks
from runtime.interface import Problem, flag_of


def must_agree(what: Path, then: dict, now: dict) -> None:
    """Refuse to go on with what was made by other flags; the first that differs is named."""
    for name, value in now.items():
        if then.get(name) != value:
            called = name if name.endswith("sha256") or name == "problem" else flag_of(name)
            raise Refusal(f"{what} was made with {called} {then.get(name)}, not {value}: use the "
                          "same flags")


def claim(args: Any, problem: Problem, stage: str, settings: dict) -> None:
    """Refuse a folder that holds results or has no room for a path; write its config.json."""
    if ranks.rank() > 0:
        return ranks.barrier()
    names = ["student.safetensors", "student", "state.pt", "log.jsonl", "metrics.json",
             "snapshots", "figures"] + ["path"] * (stage == "degrade")
    there = next(p for p in (args.out.absolute(), *args.out.absolute().parents) if p.is_dir())
    if stage == "degrade" and shutil.disk_usage(there).free < problem.disk:
        raise Refusal(f"{there} has less than {problem.disk / 1e9:.1f} GB free: name another --out")
    taken = [args.out / name for name in names if (args.out / name).exists()]
    if taken and not args.overwrite:
        raise Refusal(f"{taken[0]} exists: name another --out, go on with the run by --resume, or "
                      "replace it by --overwrite")
    file = args.out / "config.json"
    stages = files.load_json(file, "remove it") if stage == "backtrack" and file.exists() else {}
    if taken:  # it is a run's folder
        files.sweep(args.out)
    for old in taken:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    stages[stage] = {"problem": args.problem, "preset": args.preset, "seed": args.seed,
                     **dataclasses.asdict(problem.config), **settings, "ranks": ranks.world_size(),
                     "accumulate": args.accumulate, "shard": args.shard, "compile": args.compile,
                     "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
    files.save_json(file, stages)
    ranks.barrier()


def open_path(folder: Path, problem: Problem) -> DegradationPath:
    """A recorded path, which must have been recorded by the same flags."""
    path = DegradationPath(folder, problem.load_node)
    must_agree(folder, path.about, problem.about)
    return path


def cut_log(file: Path, step: int) -> None:
    """Remove the lines after `step`, and a torn one."""
    with files.blame(f"{file} is broken: remove the lines that are no JSON"):
        lines = file.read_text().splitlines(True) if file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    files.atomically(file, lambda beside: beside.write_text("".join(kept)))
