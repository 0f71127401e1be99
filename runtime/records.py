"""What a run has written, read back: whether its settings are the present ones, and its numbers."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from disback import Refusal
from runtime import files, ranks
from runtime.errors import must
from runtime.interface import Config, flag_of


def check_number(file: Path, name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise Refusal(f"{name} in {file} is {value!r}, which is no number that it can be: the file "
                      "was changed; make it again")


def must_agree(what: Path, then: dict, now: dict, some: bool = False) -> None:
    """Refuse to go on with what was made by other flags; the first that differs is named. `some`:
    what `then` lacks does not matter. A stage 2 of constant rates can have more steps."""
    for name, value in now.items():
        if then.get(name) == value or some and name not in then:
            continue
        if name == "backtrack_steps" and "constant" in (then.get("decay"), now.get("decay")):
            continue  # another decay is told as such
        if then.get(f"{name}_sha256") and value and Path(value).expanduser().exists():
            continue  # a teacher's or a model's file that was moved: its hash will be looked at
        why = {"backtrack_steps": "the cosine of its learning rates ends there: name as many; only "
               "a run with --decay constant can be prolonged",
               "degrade_steps": "its nodes are spread over them: name as many, or another --out",
               "problem": "name another",
               "path": "it was recorded again since then, or is not the one of then: use that, or "
               "another --out"}.get(name, "use the same flags")
        if name.endswith("_sha256"):  # --teacher is no flag of every problem
            of = name[:-7] if name == "teacher_sha256" else flag_of(name[:-7])
            raise Refusal(f"{what} was made with another {of}, its files say: use the files and "
                          "flags of then, which the run's config.json tells, or begin anew, from "
                          "its first stage, in another --out")
        called = name if name in ("problem", "path") else flag_of(name)
        was, wanted = ("none" if of in ("", None) else of for of in (then.get(name), value))
        raise Refusal(f"{what} was made with {called} {was}, not {wanted}: {why}")


def read_log(run: Path, begun: bool = True) -> list[dict]:
    """The lines of a run's log, which name numbers; one that a kill has torn is left out. Refusal
    where one of a run that has `begun` to log has none."""
    file = run / "log.jsonl"
    with files.blame(f"{file} is broken: remove the lines that are not a step's numbers"):
        lines = [json.loads(line) for line in file.read_text().splitlines(True)
                 if line.endswith(("\n", "}"))]  # of an editor that strips the last
        for line in lines:
            must(line["step"] >= 0 and all(
                name == "node" or isinstance(value, int | float) and math.isfinite(value)
                for name, value in line.items()), str(line))
    if begun and not lines:
        raise Refusal(f"{file} has no lines: figures need a run whose folder is whole")
    return lines


def read_snapshots(out: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """(step, {x0 [n, ...], node}) of each snapshot, the first first."""
    found, broken = {}, "{} is broken: remove it, and the figures do without it".format
    for file in sorted((out / "snapshots").glob("[0-9]*.safetensors")):
        if file.stem.isdigit():  # else a user's own
            with files.blame(broken(file)):
                found[file] = load_file(file)
    if not found:
        raise Refusal(f"{out}/snapshots has none left: figures need a run whose folder is whole")
    kinds = {file: sorted((name, str(t.dtype), t.shape) for name, t in held.items())
             for file, held in found.items()}
    usual = max(kinds.values(), key=list(kinds.values()).count)  # the odd one out is blamed
    for file, held in found.items():
        with files.blame(broken(file)):
            must(kinds[file] == usual and held["x0"].dim() and held["node"].item() >= 0 and all(
                 t.isfinite().all() for t in held.values()), "no snapshot has such numbers")
    return [(int(file.stem), held) for file, held in found.items()]


def cut_log(file: Path, step: int) -> None:
    """Remove the lines after `step`, a torn one, and later snapshots: a run that goes on may switch
    elsewhere."""
    lines = read_log(file.parent, begun=False) if file.exists() else []
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
    files.atomically(file, lambda beside: beside.write_text("".join(kept)))
    for snapshot in (file.parent / "snapshots").glob("[0-9]*.safetensors"):
        if snapshot.stem.isdigit() and int(snapshot.stem) > step:
            snapshot.unlink()


def check_finished(run: Path, problem: str, config: Config, out: Path) -> None:
    """Refuse a run that the figures of one of `problem`, in `out`, cannot show beside theirs."""
    if run.resolve() == out.resolve():
        raise Refusal(f"--compare {run} is this run itself: name another one")
    about = files.load_json(run / "metrics.json", "name another --compare, a finished run")
    if about.get("problem") != problem:
        raise Refusal(f"{run} is a run of {about.get('problem')}: --compare takes one of {problem}")
    for name in ("data", "images", "size"):  # on which a distance depends, where a problem has it
        if about.get(name) != (now := getattr(config, name, None)):
            raise Refusal(f"{run} has {name} {about.get(name)}: --compare takes a run with {now}, "
                          "as this one")
    with files.blame(f"{run} cannot be compared with: finish that run first"):
        must(about["method"] in ("disback", "vsd"), f"method {about['method']}")
        for name in ("stage1", "stage2"):
            check_number(run / "metrics.json", name, about["network_evals"][name])
        check_number(run / "metrics.json", "steps", about["steps"])
        must(read_log(run)[-1]["step"] == about["steps"],
             f"its log does not end at its {about['steps']} steps")
    read_snapshots(run)
    note_difference(run, config)


def note_difference(run: Path, config: Config) -> None:
    """Say by which settings of its stage 2 a finished run differs, as figures do not."""
    file = run / "config.json"
    then = files.load_json(file, "name another run").get("backtrack") if file.exists() else None
    then = then if isinstance(then, dict) else {}
    idle = ("interval", "switch") if then.get("target") == "teacher" else ()  # without a path
    now = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
           if field.metadata["learns"] and field.metadata["stage"] != "degrade"}
    differs = [f"{flag_of(name)} {'none' if then[name] == '' else then[name]}"
               for name, value in now.items()
               if then.get(name, value) != value and name not in idle]
    if differs and ranks.rank() == 0:
        print(f"note: the compared run was made with {', '.join(differs)}, this one is not")


def check_state_numbers(state: dict) -> None:
    """ValueError where a checkpoint's own numbers cannot be."""
    step, since, seconds = (state[name] for name in ("step", "since", "seconds"))
    node = state["others"].get("scheduler", {}).get("node", 0)
    must(type(step) is type(since) is int and 0 <= since <= step, f"step {step}, since {since}")
    must(type(node) is int and node >= 0, f"node {node}")
    must(0 <= seconds < math.inf and all(
        total.isfinite() for total in state["sums"].values()), "its sums are not finite")


def check_left(run: Path) -> None:
    """Refuse to go on with a run of which something is broken that its end reads."""
    if any((run / "snapshots").glob("[0-9]*.safetensors")):
        read_snapshots(run)
    if (file := run / "metrics.json").exists():
        before = files.load_json(file, "remove it, and it is written again")
        check_number(file, "peak_memory_bytes", before.get("peak_memory_bytes", 0))


def note_older(run: Path, made: int | None = None) -> None:
    """Say where a run has been prolonged, and its student is still that of before: of iteration
    `made`, or of metrics.json's."""
    with contextlib.suppress(Refusal, KeyError, TypeError):  # it may be no run's folder
        made = made or files.load_json(run / "metrics.json", "")["steps"]
        asked = files.load_json(run / "config.json", "")["backtrack"]["backtrack_steps"]
        if made < asked and ranks.rank() == 0:
            print(f"note: the student in {run} is of iteration {made}, the run goes on to {asked}: "
                  "backtrack.py --resume ends it", file=sys.stderr)


def must_be_recorded(folder: Path, resumed: bool) -> None:
    """Refuse a folder without a path in the words that help: it may be a run's, or under way, or
    of a run that is `resumed` and had its path elsewhere."""
    if folder.is_file():
        raise Refusal(f"{folder} is a file: name its folder by --path")
    if (folder / "path.json").exists():
        return
    if (folder / "path" / "path.json").exists():
        raise Refusal(f"{folder} is a run: name {folder / 'path'} by --path")
    if (folder / "config.json").exists():
        raise Refusal(f"{folder} is a run without a path: name another --path")
    if (folder / "state.pt").exists():
        raise Refusal(f"{folder} is not recorded to its end: degrade.py --resume goes on with it")
    if resumed:
        raise Refusal(f"{folder} is not there: if this run had its path elsewhere, name it by "
                      "--path")
    raise Refusal(f"{folder}/path.json is missing: record the path with degrade.py, or name "
                  "another by --path")


def note_path(folder: Path, nodes: int, args: Any) -> None:
    """Say where stage 2's flags do not fit a path of so many `nodes` after the teacher."""
    if ranks.rank() > 0:
        return
    wanted, last = vars(args).get("config.nodes"), (nodes - 1) * args.config.interval
    if wanted not in (None, nodes):
        print(f"note: --nodes {wanted} changes nothing: {folder} has {nodes}")
    if args.target == "path" and args.config.backtrack_steps <= last:
        print(f"note: the teacher becomes the target after iteration {last} at the earliest, and "
              f"--steps are {args.config.backtrack_steps}")


def must_hold(nodes: Sequence[Path], net: nn.Module) -> None:
    """Refuse a path whose node 0 is not the teacher, `net`, to the last bit, or of whose others a
    name, shape or type is not its own. Their names may have a word before them."""
    own, remedy = net.state_dict(), "record the path again, or name another --path"
    with files.blame(f"{nodes[0]} is not the teacher: {remedy}"), safe_open(nodes[0], "pt") as held:
        must({*held.keys()} == own.keys() and all(
            held.get_tensor(name).equal(weight.cpu()) for name, weight in own.items()),
            "other weights")
    for node in nodes[1:]:
        with files.blame(f"{node} is not of this network: {remedy}"), safe_open(node, "pt") as held:
            names = sorted(held.keys())
            must(len(names) == len(own) and all(name.endswith(its) for name, its in zip(
                names, sorted(own))), "other names")
            for name, its in zip(names, sorted(own)):
                there = held.get_slice(name)
                must(there.get_shape() == [*own[its].shape] and
                     there.get_dtype().startswith(("F", "BF")) == own[its].is_floating_point(),
                     f"{name} is {there.get_dtype()} {there.get_shape()}")


def check_finite(numbers: dict[str, float], step: int, node: Any, kept: str = "") -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise Refusal(f"{name} is {number} at step {step}, node {node}: try lower learning "
                          f"rates{kept}")
