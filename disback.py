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
import pathlib
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from resource import RUSAGE_SELF, getrusage
from typing import Any, get_args

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

BESIDE = ".unfinished"  # ends the name of a file that is being written
MEMORY = "out of mem|can't alloc"  # in the errors of memory that is short
COLLECTIVE = r"(?i:\bgloo\b|\bnccl\b)"  # in those of operations of all ranks


def score_matching_loss(net: Callable, x0: Tensor, sigma: Tensor, cond: Any = None,
                        weight: Tensor | float = 1.0, eps: Tensor | None = None) -> Tensor:
    """Denoising score matching: the mean of weight * |D(x, sigma) - x0|^2. Eq. 5 and Eq. 7 are one
    function: fake and degrading teacher are trained alike, on the student's samples x0 [n, ...],
    and differ in where they start. sigma > 0 and weight broadcast against x0; eps ~ N(0, 1) is
    drawn where it is not given."""
    assert not x0.requires_grad
    x = x0 + sigma * (torch.randn_like(x0) if eps is None else eps)
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
             weighting: str, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A loss whose gradient with respect to x0 = G(z) is vsd_gradient / x0.numel() (Eq. 8), and
    the mismatch degree. Neither fake nor target gets a gradient: Eq. 8 has no such term."""
    with torch.no_grad():
        x = x0 + sigma * (torch.randn_like(x0) if eps is None else eps)
        d_fake, d_target = fake(x, sigma, cond), target(x, sigma, cond)
        gradient = vsd_gradient(x0, sigma, d_fake, d_target, weighting)
    return (gradient * x0).mean(), distance(d_fake, d_target, sigma)


def distance(d_a: Tensor, d_b: Tensor, sigma: Tensor) -> Tensor:
    """Mean |D_a - D_b| / (sigma + 0.5), so that no noise level drowns the others. Of the fake and
    the target, on the student's noised samples, this is the mismatch degree."""
    return ((d_a - d_b).abs() / (sigma + 0.5)).mean()


class Path:
    """A recorded path: node 0 is the teacher, the last node the most degraded. Refuses a path that
    was recorded with another value of a field in `about`, or whose files are not as recorded."""

    def __init__(self, folder: str | pathlib.Path, about: dict | None = None, unpack: Any = None):
        self.folder, self.unpack = pathlib.Path(folder), unpack or load_net
        self.about = load_json(self.folder / "path.json", "record a path with degrade.py first")
        must_agree(folder, self.about, about or {})
        with blame(f"{folder}/path.json lists no nodes: record the path again"):
            hashes, farthest = list(self.about["sha256"]), float(self.about["positions"][-1])
            self.mean_gap = farthest / (len(hashes) - 1)
        self.files = [self.folder / f"{node:02d}.safetensors" for node in range(len(hashes))]
        for file, expected in zip(self.files, hashes):
            if not file.is_file() or sha256(file) != expected:
                raise Refusal(f"{file} is not the node that was recorded: record the path again")

    @classmethod
    def create(cls, folder: pathlib.Path, nodes: Sequence[pathlib.Path], **about: Any) -> "Path":
        """Number the files of the nodes, teacher first, write path.json, and open the path."""
        files = [folder / f"{node:02d}.safetensors" for node in range(len(nodes))]
        if rank() == 0:
            for node, file in zip(nodes, files):
                if node.exists():  # a run that was killed here has renamed it already
                    os.replace(node, file)
            save_json(folder / "path.json", about | {"sha256": [sha256(file) for file in files]})
        barrier()
        return cls(folder)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, node: int, net: nn.Module) -> None:
        """Copy a node's weights into `net` in place, tensor by tensor: exactly, or Refusal."""
        self.unpack(self.files[node], net)


class Walk:
    """The scheduler of Algorithm 2: the target visits nodes N-1, ..., 1, 0 and then stays at 0.

    `target` holds the teacher's weights; a switch copies a node's over them. No path: plain VSD. A
    node lasts `interval` iterations; if `adaptive`, until an interval's mean mismatch is at most
    1/N of the last node's distance from the teacher, as the fake has caught up, or 10 intervals."""

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
        if self.adaptive and self.age < 10 * self.interval and mean > self.path.mean_gap:
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
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # a file that is broken can fail in any way
        if isinstance(error, RuntimeError) and re.search(f"{MEMORY}|{COLLECTIVE}", str(error)):
            raise
        raise Refusal(f"{what} ({type(error).__name__}: {str(error)[:300]})") from error


@dataclasses.dataclass
class Problem:
    """All that a stage asks of a problem; sigma comes in a shape that broadcasts against x, and z
    in the shape of x0."""

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
    blocks: tuple[type, ...] = ()  # kinds of layers that --shard gathers one at a time


def run(main: Callable[[list[str]], None]) -> None:
    """Run a stage; a Refusal, a failing disk, too little memory or another rank's end ends it in a
    line, status 2."""
    try:
        main(sys.argv[1:])
    except (Refusal, OSError, MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or re.search(MEMORY, str(error))
        lost = re.search(COLLECTIVE, str(error)) and "(if another rank has ended, it says why)"
        if isinstance(error, RuntimeError) and not (full or lost):
            raise
        who = f"error on rank {rank()}:" if dist.is_initialized() else "error:"
        hint = "(lower --batch, or raise --accumulate)" if full else lost or ""
        print(who, *str(error).split(), hint, file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def start(stage: str, doc: str, argv: list[str], **flags: dict) -> tuple[Any, Problem]:
    """Read the command line and make the problem that it names; `flags` are the stage's own."""
    args, module, changes = parse(stage, doc, argv, flags)
    join_ranks()
    batch = dataclasses.replace(module.PRESETS[args.preset], **changes).batch
    count = world_size() * args.accumulate
    if batch % count:
        raise Refusal(f"batch {batch} must be divisible by {count}, the ranks times --accumulate: "
                      "change one of the three")
    with first_rank_first():
        problem = module.make(args.preset, args.seed, device(), **changes)
    torch.manual_seed(args.seed)  # again: a teacher that was trained and one that was found differ
    return args, problem


def parse(stage: str, doc: str, argv: list[str], flags: dict) -> tuple[Any, Any, dict]:
    """The arguments, the module of the problem, and the fields of its config that they change."""
    here = pathlib.Path(__file__).parent
    problems = sorted(file.parent.name for file in here.glob("*/problem.py"))
    parser = argparse.ArgumentParser(f"{stage}.py", description=doc, allow_abbrev=False,
                                     epilog="PROBLEM --help lists the problem's flags as well.")
    parser.error = refuse
    parser.add_argument("problem", choices=problems, metavar="PROBLEM", help=" | ".join(problems))
    parser.add_argument("--out", type=pathlib.Path, help="run folder (default: runs/PROBLEM)")
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
    for name, keywords in flags.items():
        parser.add_argument("--" + name.replace("_", "-"), **keywords)
    name = next((word for word in argv if word in problems), None)
    if name:
        module = importlib.import_module(f"{name}.problem")
        add_fields(parser, stage, module.PRESETS)
        parser.set_defaults(out=pathlib.Path("runs", name))
        if hasattr(module, "dry_run"):
            parser.add_argument("--dry-run", action="store_true", help="only print what it needs")
    args = parser.parse_args(argv)
    if args.problem != name:
        refuse(f"name the problem first: {stage}.py {args.problem} ...")
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    if args.accumulate < 1:
        refuse(f"--accumulate must be at least 1, not {args.accumulate}")
    if args.shard and "RANK" not in os.environ:
        refuse("--shard spreads over ranks: torchrun --nproc_per_node=N starts them")
    changes = {key[7:]: value for key, value in vars(args).items() if key.startswith("config.")}
    if getattr(args, "dry_run", False):
        print(module.dry_run(args.preset, **changes))
        sys.exit()
    return args, module, changes


def refuse(message: str) -> None:
    raise Refusal(f"{message} (--help lists what there is)")


def add_fields(parser: argparse.ArgumentParser, stage: str, presets: dict[str, Any]) -> None:
    """The presets, and a flag for each field of the config, explained by the comment beside it."""
    preset, config = next(iter(presets.items()))
    group = parser.add_argument_group("the problem's flags", f"in brackets: preset {preset}")
    group.add_argument("--preset", default=preset, choices=presets, help="sets the flags below")
    for field in dataclasses.fields(config):
        name = field.name.removeprefix(f"{stage}_")
        if name in ("degrade_steps", "backtrack_steps"):  # the other stage's
            continue
        comment = re.search(rf"\n    {field.name}: .*?  # (.*)", inspect.getsource(type(config)))[1]
        kind = field.type if field.type in (int, float) else str
        group.add_argument("--" + name.replace("_", "-"), dest=f"config.{field.name}", type=kind,
                           metavar="|".join(get_args(field.type)) or kind.__name__.upper(),
                           help=f"{comment} ({getattr(config, field.name)})",
                           default=argparse.SUPPRESS)


def check_config(config: Any) -> None:
    """Refuse what a field's Literal does not name, and numbers that are out of range."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), get_args(field.type)
        most = 1 if field.name in ("beta1", "beta2", "ema") else math.inf
        if choices and value not in choices:
            raise Refusal(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
        zero = most == 1 or field.default == 0 or field.name in ("weight_decay", "t_min")
        if field.type in (int, float) and not (0 < value < most or zero and value == 0):
            least = "at least" if zero else "above"
            raise Refusal(f"{field.name} must be {least} 0 and below {most}, not {value}")
    if config.nodes > config.degrade_steps:
        raise Refusal(f"nodes must be at most {config.degrade_steps}, the steps of stage 1")


def must_agree(what: pathlib.Path, then: dict, now: dict) -> None:
    """Refuse to go on with what was made by other flags; the first that differs is named."""
    for name, value in now.items():
        if then.get(name) != value:
            raise Refusal(f"{what} was made with {name} {then.get(name)}, not {value}: use the "
                          "same flags")


def claim(args: Any, problem: Problem, stage: str, settings: dict) -> None:
    """Refuse a folder that holds results or has no room for a path; write its config.json."""
    if rank() > 0:
        return barrier()
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
    stages = load_json(file, "remove it") if stage == "backtrack" and file.exists() else {}
    if taken:  # it is a run's folder
        sweep(args.out)
    for old in taken:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    stages[stage] = {"problem": args.problem, "preset": args.preset, "seed": args.seed,
                     **dataclasses.asdict(problem.config), **settings, "ranks": world_size(),
                     "accumulate": args.accumulate, "shard": args.shard, "compile": args.compile,
                     "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
    save_json(file, stages)
    barrier()


def log(file: pathlib.Path, step: int, node: Any, **numbers: float) -> None:
    """Add a line to log.jsonl, and warn where `alarm` does; refuse to go on where a number is not
    finite."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise Refusal(f"{name} is {number} at step {step}, node {node}: try lower learning "
                          f"rates; what was saved before is kept in {file.parent}")
    if rank() > 0:
        return
    with open(file, "a") as handle:
        handle.write(json.dumps({"step": step, "node": node, **numbers}) + "\n")
    if "spread" in numbers and (warning := alarm(file)):
        tqdm.write(f"warning: {warning} (iteration {step})", file=sys.stderr)


def alarm(file: pathlib.Path) -> str:
    """The warning that a log's last line is the first to deserve: the samples' spread has shrunk to
    a tenth, or the mismatch is ten times its largest in the log's first half. Else empty."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def lost(upto: int) -> str:
        mismatch, spread = ([row[name] for row in rows[:upto]] for name in ("mismatch", "spread"))
        if upto > 3 and mismatch[-1] > 10 * max(mismatch[:max(3, upto // 2)]):
            return f"the mismatch degree has grown to {mismatch[-1]:.3g}: lower learning rates"
        collapsed = upto > 0 and spread[-1] < max(spread) / 10
        return f"the samples' spread has shrunk to {spread[-1]:.3g}" if collapsed else ""

    return "" if lost(len(rows) - 1) else lost(len(rows))


def update(optimizer: torch.optim.Optimizer, lr: float, clip: float = math.inf) -> None:
    """One step of the optimizer down the gradients, whose norm is cut to `clip`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if clip < math.inf:
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()
    optimizer.zero_grad()  # at once: without DDP's buckets one network's gradients are in memory


# ------------------------------------------------------------------------------------ the ranks


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """This rank's GPU, by its number, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def join_ranks() -> None:
    """Join torchrun's ranks, each with a GPU of its own where there are any."""
    here, gpu = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if gpu:
        if here >= torch.cuda.device_count():
            raise Refusal(f"there are {torch.cuda.device_count()} GPUs: start no more ranks")
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo",
                                timeout=timedelta(hours=1))  # the first rank may train a teacher


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The other ranks wait: what the first one trains or fetches, they find in the cache."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def share(n: int, parts: int, *drawn: Any) -> list[list]:
    """This rank's `parts` equal shares of what was drawn for a batch of n: of tensors [n, ...] and
    dicts of them; anything else is for all. Every rank draws the whole batch, from the same random
    numbers: what is learnt does not depend on how many share it."""
    size = n // (world_size() * parts)
    starts = range(rank() * parts * size, (rank() + 1) * parts * size, size)
    return [[cut(value, n, slice(i, i + size)) for value in drawn] for i in starts]


def cut(value: Any, n: int, part: slice) -> Any:
    if isinstance(value, dict):
        return {name: cut(inner, n, part) for name, inner in value.items()}
    return value[part] if isinstance(value, Tensor) and value.shape[:1] == (n,) else value


def mean_over_ranks(numbers: Tensor) -> Tensor:
    if not dist.is_initialized():
        return numbers
    dist.all_reduce(numbers)
    return numbers / world_size()


class SplitOverRanks(nn.Module):
    """A network, or another function of samples, that every rank calls alike: each answers for its
    share of the n samples where n can be divided, and all get all n answers. A module, as some ask
    a network for its parameters."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        if world_size() == 1 or len(x) % world_size():
            return self.function(x, *rest)
        (mine,) = share(len(x), 1, x, *rest)
        answer = self.function(*mine).contiguous()
        answers = [torch.empty_like(answer) for _ in range(world_size())]
        dist.all_gather(answers, answer)
        return torch.cat(answers)


def ready(net: nn.Module, args: Any, blocks: tuple[type, ...], trained: bool = False,
          compiled: bool = True) -> nn.Module:
    """Shard (FSDP2) and compile `net` in place, as asked; its weights keep their names. Returns
    what to call for gradients if it is `trained`: on several ranks DDP, which averages them, or
    `net` in shards, which does so itself."""
    units = [m for m in net.modules() if isinstance(m, blocks)]
    if args.shard:
        net.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
        for block in units:
            fully_shard(block)
        # By default the root stays whole after an answer, and would answer so after a switch.
        fully_shard(net, reshard_after_forward=True)
    elif not units:
        units = [net]
    if args.compile and compiled:
        torch._dynamo.config.recompile_limit = 256  # all layers share it, and all of a kind a graph
        for unit in units:
            unit.compile(dynamic=False)  # each network has one size of batch, its own
    if world_size() == 1 or args.shard or not trained:
        return net
    return DistributedDataParallel(net, gradient_as_bucket_view=True)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of what is in shards, on the CPU; anything else as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole `tensor`, in shards and on the device of `like` where that is in shards."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def load_weights(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors over all weights of `net`, in place, each rank its shards. Where names or
    shapes differ nothing is copied: ValueError."""
    own = net.state_dict()
    here, there = ({(name, weight.shape) for name, weight in weights.items()}
                   for weights in (own, state))
    if here != there:
        differing = sorted({name for name, _ in here ^ there})
        raise ValueError(f"names or shapes differ: {', '.join(differing)}")
    net.load_state_dict({name: sharded_like(tensor, own[name])
                         for name, tensor in state.items()}, strict=True)


# ------------------------------------------------------------------------------- checkpoints


SIGNALS: list[int] = []  # that came, and ask to stop


def stoppable(steps: Iterable[int]) -> Iterator[int]:
    """The steps; SIGINT or SIGTERM lets the current one end and be saved. A second SIGINT kills at
    once; a second SIGTERM is ignored, as torchrun repeats it."""

    def heed(number: int, _: Any) -> None:
        SIGNALS.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        os.write(2, b"\nstopping after this step\n")

    SIGNALS.clear()
    before = {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield from steps
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_asked() -> str:
    """The signal that asks this rank or another to stop; empty where none does."""
    number = SIGNALS[0] if SIGNALS else 0
    if dist.is_initialized():
        found = torch.tensor(number)  # on the CPU: the accelerator is not waited for
        dist.all_reduce(found, dist.ReduceOp.MAX)
        number = int(found)
    return signal.Signals(number).name if number else ""


def save_state(file: pathlib.Path, step: int, nets: dict[str, nn.Module],
               optimizers: dict[str, torch.optim.Optimizer], **rest: Any) -> None:
    """Write all that a resumed run needs: networks, the optimizers of those that are trained, by
    the same names, and the random state. What is not finite never replaces what was good."""
    sharded = any(isinstance(net, FSDPModule) for net in nets.values())
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=sharded)
    state = rest | {"step": step, "random": [torch.get_rng_state()]}
    if torch.cuda.is_available():
        state["random"].append(torch.cuda.get_rng_state())
    for name, net in nets.items():
        state[name] = dcp.get_model_state_dict(net, options=options)
        if not all(weight.isfinite().all() for weight in state[name].values()):
            raise Refusal(f"a weight of the {name} is not finite at step {step}: try lower "
                          f"learning rates; {file} is kept as it was")
    for name, optimizer in optimizers.items():
        state["adam_" + name] = dcp.get_optimizer_state_dict(nets[name], optimizer,
                                                               options=options)
    atomically(file, lambda beside: torch.save(state, beside))
    barrier()  # no rank goes on, or ends, while the first is still writing


def load_state(file: pathlib.Path, nets: dict[str, nn.Module],
               optimizers: dict[str, torch.optim.Optimizer], settings: dict) -> dict:
    """Go back to what save_state wrote, cut later lines and a torn one from the log beside it, and
    remove what a kill left half written. Returns it all. Any number of ranks can read it."""
    with blame(f"{file} is missing or not a checkpoint of this run: start without --resume, or "
               "with --overwrite"):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        must_agree(file, state["settings"], settings)
        for name, net in nets.items():
            load_weights(net, state[name])
        for name, optimizer in optimizers.items():
            dcp.set_optimizer_state_dict(
                nets[name], optimizer, state["adam_" + name],
                options=dcp.StateDictOptions(full_state_dict=True))
        torch.set_rng_state(state["random"][0].clone())
        if torch.cuda.is_available() and len(state["random"]) > 1:  # none of a CPU's run
            torch.cuda.set_rng_state(state["random"][1].clone())
    log = file.with_name("log.jsonl")
    with blame(f"{log} is broken: remove the lines that are no JSON"):
        lines = log.read_text().splitlines(True) if log.exists() else []
        kept = [line for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
    atomically(log, lambda beside: beside.write_text("".join(kept)))
    if rank() == 0:
        sweep(file.parent)
    return state


# ---------------------------------------------------------------------------------------- files


def peak_memory() -> int:
    """In bytes: the accelerator's, or without one the process's."""
    resident = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.cuda.max_memory_allocated() or resident


def atomically(file: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Write beside `file`, then rename: whatever happens, `file` is whole, the old or the new. Only
    the first rank writes."""
    if rank() > 0:
        return
    beside = file.with_name(f".{file.name}.{os.getpid()}{BESIDE}")
    try:
        with blame(f"cannot write {file}; what it held is kept"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write(beside)
            with open(beside, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def sweep(out: pathlib.Path) -> None:
    """Remove what a killed run left half written in its folder."""
    for folder in (out, out / "snapshots"):
        for torn in (*folder.glob(f".*{BESIDE}"), *folder.glob(".tmp??????")):  # safetensors' own
            torn.unlink()


def save_tensors(file: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    found = {}
    for name, tensor in tensors.items():
        tensor = gathered(tensor)  # by all ranks; only the first keeps what is whole
        if rank() == 0:
            found[name] = tensor.contiguous()
    atomically(file, lambda f: save_file(found, f))


def load_net(file: pathlib.Path, net: nn.Module, remedy: str = "make it again") -> None:
    """Copy the weights in `file` over those of `net`, in place: all and only those, or Refusal."""
    with blame(f"{file} does not hold this network: {remedy}"):
        load_weights(net, load_file(file))


def save_json(file: pathlib.Path, value: Any) -> None:
    atomically(file, lambda f: f.write_text(json.dumps(value, indent=1) + "\n"))


def load_json(file: pathlib.Path, remedy: str) -> dict:
    with blame(f"{file} cannot be read: {remedy}"):
        return dict(json.loads(file.read_text()))


def sha256(file: pathlib.Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
