"""What a stage asks of a problem, and the settings that all problems share."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from runtime.errors import must_be_allowed


def setting(default: Any, text: str, stage: str = "", zero: bool = False, below: float = 1e18,
            learns: bool = True) -> Any:
    """A field of a Config, and a flag of the `stage` that uses it, "" both, explained by `text`. A
    number is above 0 (`zero`: or 0) and `below`; without `learns` it changes nothing learnt."""
    return dataclasses.field(default=default, metadata=dict(  # argparse reads its % as a format
        help=text.replace("%", "%%"), stage=stage, learns=learns,
        limits=dict(zero=zero, below=below)))


stage1 = functools.partial(setting, stage="degrade")
stage2 = functools.partial(setting, stage="backtrack")


def flag_of(name: str) -> str:
    """The flag that sets a field: both stages call their number of steps --steps."""
    return "--" + name.removeprefix("degrade_").removeprefix("backtrack_").replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The settings that every problem has. A preset is a Config; its settings are flags."""

    degrade_steps: int = stage1(200, "training steps of this stage")
    backtrack_steps: int = stage2(2000, "iterations: an update of the student, then the fake's")
    batch: int = setting(512, "samples in a batch, of all ranks together")
    nodes: int = stage1(10, "N, the nodes that are recorded after the teacher", below=10_000)
    spacing: Literal["arc", "linear", "log"] = stage1("arc", "of nodes, by distance or by steps")
    interval: int = stage2(10, "iterations that the target stays at a node")
    switch: Literal["interval", "adaptive"] = stage2("interval", "adaptive: the fake has caught up")
    weighting: Literal["score", "eps", "half", "x0", "dmd"] = stage2("eps", "w(sigma) of Eq. 8")
    lr_student: float = stage2(6e-3, "learning rate of the student")
    lr_fake: float = stage2(6e-3, "learning rate of the fake")
    lr_degrade: float = stage1(2e-3, "learning rate of the degrading teacher")
    fake_updates: int = stage2(1, "updates of the fake after each of the student")
    beta1: float = setting(0.0, "of Adam", zero=True, below=1)
    beta2: float = setting(0.999, "of Adam", zero=True, below=1)
    weight_decay: float = setting(0.0, "of AdamW; 0 makes it Adam", zero=True)
    decay: Literal["cosine", "constant"] = stage2("cosine", "of the learning rates of stage 2")
    ema: float = stage2(0.95, "decay of the student's average; 0: none", zero=True, below=1)
    save_every: int = setting(100, "iterations between checkpoints", learns=False)
    log_every: int = setting(25, "iterations between lines of log.jsonl", learns=False)
    precision: Literal["fp32", "bf16"] = setting("fp32", "of arithmetic; weights are fp32")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            must_be_allowed(flag_of(field.name), getattr(self, field.name), field.type,
                            **field.metadata["limits"])


@dataclasses.dataclass
class Problem:
    """All that a stage asks of a problem; sigma broadcasts against x, and z has x0's shape."""

    config: Config
    about: dict  # what a path and the run that walks it must share, as json has it
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
    looks_at: Callable = lambda step: False  # step -> whether to log and keep this one as well
    diagnose: Callable = lambda student, fake: {}  # {name: number}, more of a log's line
    look: Callable = lambda student, fake, target: {}  # {name: tensor}, more of a snapshot
    guide: Callable = lambda net, x, sigma, cond: net(x, sigma, cond)  # guidance of the target
    guide_evals: int = 1  # forwards of the network in a call of guide
    clip: float = math.inf  # the largest norm of a gradient
    disk: int = 0  # bytes that must be free before a path is recorded, where nodes are not whole
    exported: int = 0  # bytes that the end writes of the student, beside its weights
    pack: Callable = nn.Module.state_dict  # net -> the tensors that are stored of a node
    load_node: Callable | None = None  # (node's file, net), where pack stores something else
    blocks: tuple[type, ...] = ()  # kinds of layers that are sharded and compiled one at a time
