"""A run's folder: who may use it, what is its own in it, and what made earlier fits a command."""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from disback import DegradationPath, Refusal
from runtime import files, ranks, records
from runtime.interface import Config, Problem

# What the stages write; a problem adds what it draws.
STAGE1 = ("path/path.json", "path/[0-9]*.safetensors", "path/step-*.safetensors", "path/state.pt",
          "path/log.jsonl")
STAGE2 = ("student.safetensors", "state.pt", "log.jsonl", "metrics.json",
          "snapshots/[0-9]*.safetensors")
STARTS = ("step-0.safetensors", "0000000.safetensors")  # are written before a stage's first step
LOG = 10**7  # bytes for a log, snapshots and figures; the toy's are 5 MB
HELD: list[tuple] = []  # of each lock its file, its handle and the folders made for it


def writes(stage: str, draws: tuple[str, ...]) -> tuple[str, ...]:
    """What a stage replaces in a run's folder; `draws` are the problem's own files."""
    return (*STAGE2, *draws, *(STAGE1 if stage == "degrade" else ()))


def what_matters(config: Config, stage: str) -> dict[str, Any]:
    """The settings that change what a stage learns."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if field.metadata["learns"] and field.metadata["stage"] in ("", stage)}


def enter(stage: str, args: Any) -> None:
    """Before anything is trained: refuse a folder of no use, and keep other processes out of it."""
    out, room = args.out, 0 if args.resume or args.overwrite else LOG
    for place in sorted({out, *(Path(out, name).parent for name in args.writes)}):
        if place.resolve() != out.resolve() / place.relative_to(out):
            raise Refusal(f"{place} is a link: put a folder in its place, or name another --out")
        files.must_take_files(place, "--out", room * (place == out))
    if ranks.rank() == 0:
        lock(out)  # first: what is there may be another's, under way
    known = {name: vars(args)[name] for name in ("problem", "preset", "seed", "target", "fake_init")
             if name in args} | what_matters(args.config, stage)
    walked = args.path if stage == "backtrack" else None
    if walked and (walked / "path.json").is_file():
        known["path"] = files.sha256(walked / "path.json")
    recorded = stage == "degrade" and (out / "path" / "path.json").exists()
    refuse_taken(stage, args)
    if recorded and args.resume:
        path = read_path(out / "path", known)
        records.must_agree(out / "path", stages_of(out).get("degrade", {}), known, some=True)
    elif args.resume:
        check_state(out, stage, known, learnt(stage, args))
        records.check_left(out)
    if walked:
        records.must_be_recorded(walked, args.resume)
        path = read_path(walked, known)
        records.note_path(walked, len(path) - 1, args)
    if stage == "backtrack" and args.compare:
        records.check_finished(args.compare, args.problem, args.config, out)
    if args.resume and recorded:
        if ranks.rank() == 0:
            (out / "path" / "state.pt").unlink(missing_ok=True)
            print(f"nodes 0 to {len(path) - 1} are recorded already in {out / 'path'}")
        sys.exit()


def lock(out: Path) -> None:
    """Hold `out` until this process ends, however it does; a second process is refused."""
    file, new = out / ".disback.lock", [p for p in (out, *out.parents) if not p.exists()]
    with files.blame(f"cannot write {file}: remove it, or name another --out"):
        out.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError as error:
            raise Refusal(f"permission denied: {file}: remove it, if no process works in that "
                          "folder, or name another --out") from error
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise Refusal(f"another process works in {out}: wait, or name another --out") from error
    except OSError:  # a file system without locks
        pass
    HELD.append((file, handle, new))
    if not is_at(handle, file):  # who held it has ended meanwhile, and removed it
        lock(out)


def is_at(handle: int, file: Path) -> bool:
    return file.exists() and os.path.samestat(os.fstat(handle), os.stat(file))


def must_be_here() -> None:
    """Refuse to go on where the folder that was locked last is moved: another may be there now."""
    if HELD and not is_at(HELD[-1][1], HELD[-1][0]):
        raise Refusal(f"{HELD[-1][0].parent} was moved or removed, or its lock was: --resume goes "
                      "on, with --out where it is now")


def leave() -> None:
    """Let go of what this process holds. Where it wrote nothing, nothing stays: a lock's file is
    removed, by its holder alone, and then the folders that the lock made, if they are empty."""
    while HELD:
        file, handle, new = HELD.pop()
        with contextlib.suppress(OSError):
            if is_at(handle, file):
                file.unlink()
        os.close(handle)
        with contextlib.suppress(OSError):
            for place in new:
                place.rmdir()


def own(args: Any) -> list[Path]:
    """What a former run wrote that this one replaces; a user's own name is no number."""
    named = (args.out / name for name in args.writes if "*" not in name)
    numbered = (file for name in args.writes if "*" in name for file in args.out.glob(name))
    return [*(file for file in named if os.path.lexists(file)), *sorted(
        file for file in numbered if file.stem.removeprefix("step-").isdigit())]


def learnt(stage: str, args: Any) -> list[Path]:
    """own() without what this stage wrote before its first step, which may have failed."""
    began = stage in stages_of(args.out)
    return [file for file in own(args) if not (began and file.name in STARTS)]


def refuse_taken(stage: str, args: Any) -> None:
    """Refuse what no run made, and results, unless they shall be overwritten or gone on with."""
    out, taken, stages = args.out, learnt(stage, args), stages_of(args.out)
    for other in {about["problem"] for about in stages.values()} - {args.problem}:
        raise Refusal(f"{out} holds a run of {other}: name another --out")
    named = [value for value in vars(args.config).values() if type(value) is str and value]
    here, *places = (Path(os.path.realpath(name)) for name in (out, *named))
    reads = {place for place in places if here in place.parents}  # files and folders in `out`
    for file in own(args):
        if file.is_dir():
            raise Refusal(f"{file} was not made by a run, it is a folder: name another --out")
        there = Path(os.path.realpath(file))
        if reads & {there, *there.parents}:
            raise Refusal(f"{file} is to be read, and would be replaced: name another --out")
    if not taken or args.resume or args.overwrite and stages:
        return
    begun = any((out / name).exists() for name in (
        ("path/state.pt", "path/path.json") if stage == "degrade" else ("state.pt",)))
    remedy = ("name another --out, " + begun * "go on with the run by --resume, "
              + "or replace it by --overwrite")
    if not stages:
        remedy = f"{out} is no run's folder: name another --out"
    elif is_finished(out):
        remedy = ("name another --out; backtrack.py --resume draws the figures of a finished run "
                  "again")
    raise Refusal(f"{taken[0]} exists: {remedy}")


def is_finished(out: Path) -> bool:
    return any((out / name).exists() for name in ("student.safetensors", "metrics.json"))


def stages_of(out: Path) -> dict:
    """What config.json tells of each stage that ran here; Refusal where it is not a run's."""
    file = out / "config.json"
    if not file.exists():
        return {}
    stages = files.load_json(file, "name another --out")
    if not stages or not all(name in ("degrade", "backtrack") and isinstance(about, dict)
               and isinstance(about.get("problem"), str) for name, about in stages.items()):
        raise Refusal(f"{file} is not of a run: name another --out")
    return stages


def claim(args: Any, problem: Problem, stage: str, settings: dict, need: int) -> None:
    """Remove what a former run wrote, if that is asked for, and write config.json; `need` bytes
    must be free, or held by what is removed or gone on with."""
    if ranks.rank() > 0:
        return ranks.barrier()
    gone = [args.out / "state.pt"] if args.resume and stage == "backtrack" else own(args)
    if shutil.disk_usage(args.out).free + sum(file.lstat().st_size for file in gone) < need:
        raise Refusal(f"{args.out} has less than {need / 1e9:.2g} GB of free space: make "
                      "room, or name another --out")
    for file in own(args) if not args.resume else ():
        file.unlink()
        with contextlib.suppress(OSError):  # other files are in that folder
            file.parent.rmdir()
    left = sorted({file.name for file in args.out.iterdir()} - {
        "path", "snapshots", "figures", "config.json", ".disback.lock"})
    if left and args.overwrite:
        print(f"note: {args.out} keeps what its stages do not write, maybe of the run before: "
              + ", ".join(left))
    stages = stages_of(args.out) if stage == "backtrack" or args.resume else {}
    stages[stage] = {"problem": args.problem, "preset": args.preset, "seed": args.seed,
                     **dataclasses.asdict(problem.config), **settings, "ranks": ranks.world_size(),
                     "accumulate": args.accumulate, "shard": args.shard, "compile": args.compile,
                     "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
    files.save_json(args.out / "config.json", stages)
    for name in map(Path, (*args.writes, "config.json")):  # other programs' may be under way
        files.sweep((args.out / name).parent, name.name)
        files.sweep(args.out, name.parts[0])  # a folder that is written whole
    ranks.barrier()


def check_state(out: Path, stage: str, known: dict, taken: list[Path]) -> None:
    """Refuse to go on without a checkpoint, or with one of other flags; `taken`: learnt() files."""
    file = (out / "path" if stage == "degrade" else out) / "state.pt"
    finished = is_finished(out)
    if not file.exists():
        raise Refusal(f"{file} is missing, which --resume needs: " + (
            f"the student is finished, {out}/student.safetensors; name another --out to train one "
            "again" if finished else "start without it" if not taken else "name another --out"
            + ", or start with --overwrite in its place" * bool(stages_of(out))))
    with files.blame(f"{file} is not a checkpoint of this run: " + (
            "name another --out" if finished else "start with --overwrite in place of --resume")):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        records.must_agree(file, state["settings"], known)
        records.check_state_numbers(state)
        if state["step"] > known[f"{stage}_steps"]:
            raise Refusal(f"{file} is at step {state['step']} already: --steps must be at least "
                          "as many")


def read_path(folder: Path, known: dict, load_node: Any = None) -> DegradationPath:
    """A recorded path, which must have been recorded by the same flags as far as it names them."""
    for file in folder.glob("*.safetensors"):
        with files.blame(f"{file} cannot be read: record the path again, or name another path"):
            file.open("rb").close()  # safetensors calls missing what it must not read
    path = DegradationPath(folder, load_node)
    for name in ("steps", "positions"):
        for value in path.about[name]:
            records.check_number(folder / "path.json", name, value)
    steps, positions = path.about["steps"], path.about["positions"]
    if len(steps) != len(positions) or steps != sorted({int(step) for step in steps}):
        raise Refusal(f"{folder}/path.json was changed, its steps cannot be: record the path again")
    records.must_agree(folder, path.about | {
        "nodes": len(path) - 1, "degrade_steps": path.about["steps"][-1]}, known, some=True)
    records.check_number(folder / "path.json", "network_evals", path.about.get("network_evals", 0))
    return path


def open_path(folder: Path, problem: Problem) -> DegradationPath:
    """The same for a problem, all of whose flags the path must name."""
    path = read_path(folder, {}, problem.load_node)
    records.must_agree(folder, path.about, problem.about)
    records.must_hold(path.files, problem.teacher)
    return path
