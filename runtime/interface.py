"""What a stage asks of a problem, and the settings that all problems share."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import nn

from disback import Refusal


def setting(default: Any, text: str, zero: bool = False, below: float = math.inf,
            flag: bool = True, stage: str = "", learns: bool = True) -> Any:
    """A field of a Config, and a flag of the command line unless told otherwise, explained by
    `text`. A number must be above 0 (`zero`: or 0) and less than `below`. `stage` is the one that
    uses the field, "" both; without `learns` it changes nothing that is learnt."""
    return dataclasses.field(default=default, metadata={
        "help": text, "zero": zero, "below": below, "flag": flag, "stage": stage, "learns": learns})


stage1 = functools.partial(setting, stage="degrade")
stage2 = functools.partial(setting, stage="backtrack")


def flag_of(name: str) -> str:
    """The flag that sets a field: both stages call their number of steps --steps."""
    name = "steps" if name in ("degrade_steps", "backtrack_steps") else name
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The settings that every problem has. A preset is a Config; its fields are flags,
    but for those with flag=False."""

    degrade_steps: int = stage1(200, "training steps of this stage")
    backtrack_steps: int = stage2(2000, "iterations: an update of the student, then the fake's")
    batch: int = setting(512, "samples in a batch, of all ranks together")
    nodes: int = stage1(10, "N, the nodes that are recorded after the teacher", below=10_000)
    spacing: Literal["arc", "linear", "log"] = stage1("arc", "where nodes are recorded: at equal "
                                                       "distances in function space, or by steps")
    interval: int = stage2(10, "iterations that the target stays at a node")
    switch: Literal["interval", "adaptive"] = stage2(
        "interval", "when the target moves on; adaptive: once the fake has caught up")
    weighting: Literal["score", "eps", "half", "x0", "dmd"] = stage2("eps", "w(sigma) of Eq. 8")
    lr_student: float = stage2(6e-3, "learning rate of the student")
    lr_fake: float = stage2(6e-3, "learning rate of the fake")
    lr_degrade: float = stage1(2e-3, "learning rate of the degrading teacher")
    fake_updates: int = stage2(1, "updates of the fake after each of the student")
    beta1: float = setting(0.0, "of Adam", zero=True, below=1)
    beta2: float = setting(0.999, "of Adam", zero=True, below=1)
    weight_decay: float = setting(0.0, "of AdamW; 0 makes it Adam", zero=True)
    decay: Literal["cosine", "constant"] = stage2("cosine", "of the learning rates of stage 2")
    ema: float = stage2(0.95, "decay of the student's moving average; 0: no average",
                        zero=True, below=1)
    save_every: int = setting(100, "iterations between checkpoints", learns=False)
    log_every: int = setting(25, "iterations between lines of log.jsonl", learns=False)
    precision: Literal["fp32", "bf16"] = setting(
        "fp32", "of the networks' arithmetic; weights are fp32")

    def __post_init__(self) -> None:
        """Refuse what a field's Literal does not name, and numbers that are out of range."""
        for field in dataclasses.fields(self):
            value, choices, flag = getattr(self, field.name), get_args(field.type), flag_of(
                field.name)
            if choices and value not in choices:
                raise Refusal(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
            if field.type not in (int, float):
                continue
            zero = field.metadata["zero"]
            low, most = (0, 2**40) if field.type is int else (1e-18, 1e18)  # squares in float32
            high = min(most, field.metadata["below"])
            if type(value) not in (int, field.type) or not (low < value < high
                                                            or zero and value == 0):
                raise Refusal(f"{flag} must be {'0 or ' * zero}above {low} and below {high}, not "
                              f"{value!r}")
        if self.nodes > self.degrade_steps:
            raise Refusal(f"--nodes must be at most {self.degrade_steps}, the --steps of stage 1")


@dataclasses.dataclass
class Problem:
    """All that a stage asks of a problem; sigma comes in a shape that broadcasts against x, and z
    in the shape of x0."""

    config: Config
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
    # Where the problem wants to see more of stage 2 than its regular lines and snapshots:
    looks_at: Callable = lambda step: False  # step -> whether to log and keep this one as well
    diagnose: Callable = lambda student, fake: {}  # {name: number}, more of a log's line
    look: Callable = lambda student, fake, target: {}  # {name: tensor}, more of a snapshot
    guide: Callable = lambda net, x, sigma, cond: net(x, sigma, cond)  # guidance of the target
    guide_evals: int = 1  # forwards of the network in a call of guide
    clip: float = math.inf  # the largest norm of a gradient
    disk: int = 0  # bytes that must be free before a path is recorded
    pack: Callable = nn.Module.state_dict  # net -> the tensors that are stored of a node
    load_node: Callable | None = None  # (node's file, net), where pack stores something else
    blocks: tuple[type, ...] = ()  # kinds of layers that are sharded and compiled one at a time
