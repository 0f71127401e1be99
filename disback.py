"""DisBack: Distribution Backtracking Distillation (Zhang et al., ICLR 2025, arXiv 2408.15991).

The method comes first, the plumbing that both stages need after it. One convention everywhere:
x = x0 + sigma * eps, and every score network is a denoiser D(x, sigma, cond) -> x0, whose score
is (D(x, sigma, cond) - x) / sigma**2.

| paper                               | here                           | where          |
|-------------------------------------|--------------------------------|----------------|
| s_theta, the pre-trained score      | teacher                        | Problem        |
| s'_theta_i, a node of the path      | node i; node 0 is the teacher  | Path           |
| G_stu and its initial G^0_stu       | student                        | Problem        |
| s_phi, the score of G_stu's samples | fake                           | backtrack.py   |
| the score that G_stu is drawn to    | target                         | Walk           |
| Eq. 5 (fake), Eq. 7 (degradation)   | score_matching_loss            | both stages    |
| Eq. 8, the gradient of the KL       | vsd_gradient, vsd_loss         | backtrack.py   |
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as File
from resource import RUSAGE_SELF, getrusage
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def score_matching_loss(net: Callable, x0: Tensor, sigma: Tensor, cond: Any = None,
                        weight: Tensor | float = 1.0) -> Tensor:
    """Denoising score matching: the mean of weight * |D(x, sigma) - x0|^2. Eq. 5 and Eq. 7 are one
    function: fake and degrading teacher are trained alike, on the student's samples x0 [n, ...],
    and differ in where they start. sigma > 0 and weight broadcast against x0."""
    assert not x0.requires_grad
    x = x0 + sigma * torch.randn_like(x0)
    return (weight * (net(x, sigma, cond) - x0) ** 2).mean()


def vsd_gradient(x0: Tensor, sigma: Tensor, d_fake: Tensor, d_target: Tensor,
                 weighting: str) -> Tensor:
    """Eq. 8's w(sigma) * (s_fake - s_target), the gradient with respect to x0 [n, ...].

    At one x the scores differ by (D_fake - D_target) / sigma^2, so that w = 1 is "score", sigma
    "eps", sigma^2 "x0" (Diff-Instruct) and sigma^2 / mean|x0 - D_target| "dmd" (DMD2).
    """
    difference = d_fake - d_target
    if weighting == "dmd":
        return difference / (x0 - d_target).abs().mean(dim=tuple(range(1, x0.dim())), keepdim=True)
    return difference / sigma ** {"score": 2, "eps": 1, "x0": 0}[weighting]


def vsd_loss(x0: Tensor, sigma: Tensor, fake: Callable, target: Callable, cond: Any,
             weighting: str) -> tuple[Tensor, Tensor]:
    """A loss whose gradient with respect to x0 = G(z) is vsd_gradient / x0.numel() (Eq. 8), and
    the mismatch degree. Neither fake nor target gets a gradient: Eq. 8 has no such term."""
    with torch.no_grad():
        x = x0 + sigma * torch.randn_like(x0)
        d_fake, d_target = fake(x, sigma, cond), target(x, sigma, cond)
        gradient = vsd_gradient(x0, sigma, d_fake, d_target, weighting)
    return (gradient * x0).mean(), distance(d_fake, d_target, sigma)


def distance(d_a: Tensor, d_b: Tensor, sigma: Tensor) -> Tensor:
    """Mean |D_a - D_b| / (sigma + 0.5), by which divisor every noise level counts. Of the fake and
    the target, on the student's noised samples, this is the mismatch degree."""
    return ((d_a - d_b).abs() / (sigma + 0.5)).mean()


class Path:
    """A recorded path: node 0 is the teacher, the last node the most degraded. Refuses a path that
    was recorded with another value of a field in `about`, or whose files are not as recorded."""

    def __init__(self, folder: str | File, about: dict | None = None, unpack: Any = None):
        self.folder, self.unpack = File(folder), unpack or load_net
        self.about = load_json(self.folder / "path.json", "record a path with degrade.py first")
        must_agree(folder, self.about, about or {})
        with blame(f"{folder}/path.json lists no nodes: record the path again"):
            hashes, farthest = list(self.about["sha256"]), float(self.about["positions"][-1])
            self.spacing = farthest / (len(hashes) - 1)
        self.files = [self.folder / f"{node:02d}.safetensors" for node in range(len(hashes))]
        for file, expected in zip(self.files, hashes):
            if not file.is_file() or sha256(file) != expected:
                raise Refusal(f"{file} is not the node that was recorded: record the path again")

    @classmethod
    def create(cls, folder: File, nodes: Sequence[File], **about: Any) -> "Path":
        """Number the files of the nodes, teacher first, write path.json, and open the path."""
        files = [folder / f"{node:02d}.safetensors" for node in range(len(nodes))]
        for node, file in zip(nodes, files):
            os.replace(node, file)
        save_json(folder / "path.json", about | {"sha256": [sha256(file) for file in files]})
        return cls(folder)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, node: int, net: nn.Module) -> None:
        """Copy a node's weights into `net` in place, tensor by tensor: exactly, or Refusal."""
        self.unpack(self.files[node], net)


class Walk:
    """The scheduler of Algorithm 2: the target visits nodes N-1, ..., 1, 0 and then stays at 0.

    `target` holds the teacher's weights; a switch copies a node's over them. No path: plain VSD. A
    node lasts `interval` iterations; if `adaptive`, up to 10 intervals, until in one the mean
    mismatch falls to 1/N of the last node's distance from the teacher: the fake has caught up."""

    def __init__(self, path: Path | None, target: nn.Module, interval: int, adaptive: bool = False):
        self.path, self.target, self.interval, self.adaptive = path, target, interval, adaptive
        self.node, self.age, self.mismatch = len(path) - 2 if path else 0, 0, 0.0
        if path:
            path.load(self.node, target)

    def step(self, mismatch: Tensor | float = 0.0) -> bool:
        """Call after every iteration with its mismatch degree; True where the target switched."""
        if self.node == 0:
            return False
        self.age, self.mismatch = self.age + 1, self.mismatch + mismatch
        if self.age % self.interval:
            return False
        mean, self.mismatch = self.mismatch / self.interval, 0.0
        if self.adaptive and self.age < 10 * self.interval and mean > self.path.spacing:
            return False
        self.node, self.age = self.node - 1, 0
        self.path.load(self.node, self.target)
        return True


# ------------------------------------------------------------------------------ the plumbing


class Refusal(ValueError):
    """A mistake of the user's: one line with cause and remedy, exit status 2, no traceback."""


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Refuse, in the words of `what`, to go on with what fails inside: a file, mostly."""
    try:
        yield
    except (Refusal, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file that is broken can fail in any way
        raise Refusal(f"{what} ({type(error).__name__}: {str(error)[:300]})") from error


@dataclasses.dataclass
class Problem:
    """All that a stage asks of a problem; sigma comes in a shape that broadcasts against x."""

    config: Any  # a frozen dataclass of numbers and choices
    about: dict  # what a path and the run that walks it must share
    teacher: nn.Module  # D(x, sigma, cond) -> x0
    student: nn.Module  # the generator's network at its initial state
    generate: Callable  # (student, z, cond) -> x0, in one step
    sample_inputs: Callable  # n -> (z, cond)
    sample_sigma: Callable  # n -> sigma for score matching
    sample_sigma_vsd: Callable  # n -> sigma for the student's update
    score_weight: Callable  # sigma -> weight of the score-matching loss
    evaluate: Callable  # student -> {name: number}, leaving torch's random state alone
    draw: Callable  # (run folder, path or None, another run's folder or None): the figures
    snapshot: Callable  # () -> (z, cond) of the samples kept at every checkpoint and switch
    guide: Callable = lambda net, x, sigma, cond: net(x, sigma, cond)  # guidance of the target
    guide_evals: int = 1  # forwards of the network in a call of guide
    clip: float = math.inf  # the largest norm of a gradient
    disk: int = 0  # bytes that must be free before a path is recorded
    pack: Callable | None = None  # (net) -> tensors that are stored of a node, where not all are
    unpack: Callable | None = None  # (node's file, net): copies into net what pack has stored


def run(main: Callable[[list[str]], None]) -> None:
    """Run a stage; a Refusal, a failing disk or too little memory ends it in a line, status 2."""
    try:
        main(sys.argv[1:])
    except (Refusal, OSError, MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or re.search("out of mem|can't alloc", str(error))
        if isinstance(error, RuntimeError) and not full:
            raise
        print("error:", *str(error).split(), *["(lower --batch)"] * bool(full), file=sys.stderr)
        sys.exit(2)


def start(stage: str, doc: str, argv: list[str], **flags: dict) -> tuple[Any, Problem]:
    """Read the command line and make the problem that it names; `flags` are the stage's own."""
    problems = sorted(file.parent.name for file in File(__file__).parent.glob("*/problem.py"))
    parser = argparse.ArgumentParser(f"{stage}.py", description=doc, allow_abbrev=False,
                                     epilog="PROBLEM --help lists the problem's flags as well.")
    parser.error = refuse
    parser.add_argument("problem", choices=problems, metavar="PROBLEM", help=" | ".join(problems))
    parser.add_argument("--out", type=File, help="run folder (default: runs/PROBLEM)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    for name, keywords in flags.items():
        parser.add_argument("--" + name.replace("_", "-"), **keywords)
    name = next((word for word in argv if word in problems), None)
    if name:
        module = importlib.import_module(f"{name}.problem")
        add_fields(parser, stage, module.PRESETS)
        parser.set_defaults(out=File("runs", name))
        if hasattr(module, "dry_run"):
            parser.add_argument("--dry-run", action="store_true", help="only print what it needs")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    changes = {key[7:]: value for key, value in vars(args).items() if key.startswith("config.")}
    if getattr(args, "dry_run", False):
        sys.exit(print(module.dry_run(args.preset, **changes)))  # None: status 0
    problem = module.make(args.preset, args.seed,
                          "cuda" if torch.cuda.is_available() else "cpu", **changes)
    torch.manual_seed(args.seed)  # again: making it may have trained a teacher, or found one
    return args, problem


def refuse(message: str) -> None:
    raise Refusal(f"{message} (--help lists what there is)")


def add_fields(parser: argparse.ArgumentParser, stage: str, presets: dict[str, Any]) -> None:
    """The presets, and a flag for each field of the config, explained by the comment beside it."""
    preset, config = next(iter(presets.items()))
    group = parser.add_argument_group("the problem's flags", f"in brackets: preset {preset}")
    group.add_argument("--preset", default=preset, choices=presets, help="values of these flags")
    for field in dataclasses.fields(config):
        if {"degrade_steps": "backtrack", "backtrack_steps": "degrade"}.get(field.name) == stage:
            continue
        comment = re.search(rf"\n    {field.name}: .*?  # (.*)", inspect.getsource(type(config)))[1]
        flag = re.sub("^(degrade|backtrack)_", "", field.name).replace("_", "-")
        group.add_argument(f"--{flag}", dest=f"config.{field.name}",
                           metavar="|".join(get_args(field.type)),
                           type=field.type if field.type in (int, float) else str,
                           help=f"{comment} ({getattr(config, field.name)})",
                           default=argparse.SUPPRESS)


def check_config(config: Any) -> None:
    """Refuse what a field's Literal does not name, and numbers that are out of range."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), get_args(field.type)
        most = 1 if field.name in ("beta1", "beta2", "ema") else math.inf
        if choices and value not in choices:
            raise Refusal(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
        zero = most == 1 or field.default == 0
        if field.type in (int, float) and not (0 < value < most or zero and value == 0):
            raise Refusal(f"{field.name} must be {'0 or ' * zero}above 0 and below {most}")
    if config.nodes > config.degrade_steps:
        raise Refusal(f"nodes must be at most {config.degrade_steps}, as stage 1's steps are")


def must_agree(what: File, then: dict, now: dict) -> None:
    """Refuse to go on with what was made by other flags; the first that differs is named."""
    for name, value in now.items():
        if then.get(name) != value:
            raise Refusal(f"{what} is of {name} {then.get(name)}, not {value}: use the same flags")


def claim(args: Any, problem: Problem, stage: str, settings: dict) -> None:
    """Refuse a folder that holds results or has no room for a path; write its config.json."""
    names = ["student.safetensors", "student", "state.pt", "log.jsonl", "metrics.json",
             "snapshots", "figures"] + ["path"] * (stage == "degrade")
    there = next(p for p in (args.out.absolute(), *args.out.absolute().parents) if p.is_dir())
    if stage == "degrade" and shutil.disk_usage(there).free < problem.disk:
        raise Refusal(f"{there} has less than {problem.disk / 1e9:.1f} GB free: name another --out")
    taken = [args.out / name for name in names if (args.out / name).exists()]
    if taken and not args.overwrite:
        raise Refusal(f"{taken[0]} exists: name another --out, or replace the run by --overwrite")
    file = args.out / "config.json"
    stages = load_json(file, "remove it") if stage == "backtrack" and file.exists() else {}
    for old in taken:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    stages[stage] = {"problem": args.problem, "preset": args.preset, "seed": args.seed,
                     **dataclasses.asdict(problem.config), **settings,
                     "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
    save_json(file, stages)


def log(file: File, step: int, node: Any, **numbers: float) -> None:
    """Add a line to log.jsonl, or refuse to go on where a number is not finite."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise Refusal(f"{name} is {number} at step {step}, node {node}: try lower learning "
                          f"rates; what was saved before is kept in {file.parent}")
    with open(file, "a") as handle:
        handle.write(json.dumps({"step": step, "node": node, **numbers}) + "\n")


def update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, clip=math.inf) -> None:
    """One step of the optimizer down the loss, the norm of its gradient cut to `clip`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    if clip < math.inf:
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()
    optimizer.zero_grad()  # at once: the gradients of one network only are in memory at a time


def peak_memory() -> int:
    """In bytes: the accelerator's, or without one the process's."""
    resident = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.cuda.max_memory_allocated() or resident


def atomically(file: File, write: Callable[[File], Any]) -> None:
    """Write beside `file`, then rename: whatever happens, `file` is whole, the old or the new."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with blame(f"cannot write {file}; what it held is kept"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write(beside)
            with open(beside, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def save_tensors(file: File, tensors: dict[str, Tensor]) -> None:
    atomically(file, lambda f: save_file({k: t.contiguous() for k, t in tensors.items()}, f))


def load_net(file: File, net: nn.Module, remedy: str = "make it again") -> None:
    """Copy the weights in `file` over those of `net`, in place: all and only those, or Refusal."""
    with blame(f"{file} does not hold this network: {remedy}"):
        net.load_state_dict(load_file(file), strict=True)


def save_json(file: File, value: Any) -> None:
    atomically(file, lambda f: f.write_text(json.dumps(value, indent=1) + "\n"))


def load_json(file: File, remedy: str) -> dict:
    with blame(f"{file} cannot be read: {remedy}"):
        return dict(json.loads(file.read_text()))


def sha256(file: File) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
