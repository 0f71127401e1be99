"""DisBack: Distribution Backtracking Distillation (Zhang et al., ICLR 2025, arXiv 2408.15991).

This file is the method, and the library for a loop of your own: it needs torch and safetensors.
One convention everywhere: x = x0 + sigma * eps, and every score network is a denoiser
D(x, sigma, cond) -> x0. Its score is (D(x, sigma, cond) - x) / sigma**2.

| paper                               | here                           | where           |
|-------------------------------------|--------------------------------|-----------------|
| s_theta, the pre-trained score      | teacher                        | Problem         |
| s'_theta_i, a node of the path      | node i; node 0 is the teacher  | DegradationPath |
| G_stu and its initial G^0_stu       | student                        | Problem         |
| s_phi, the score of G_stu's samples | fake                           | backtrack.py    |
| the score that G_stu is drawn to    | target                         | PathScheduler   |
| Eq. 5 (fake), Eq. 7 (degradation)   | update_score_model             | both stages     |
| Eq. 8, the gradient of the KL       | vsd_gradient, vsd_loss         | backtrack.py    |
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Refusal(ValueError):
    """A mistake of the user's: one line with its cause and its remedy."""


def score_matching_loss(net: Callable, x0: Tensor, sigma: Tensor, cond: Any = None,
                        weight: Tensor | float = 1.0, eps: Tensor | None = None) -> Tensor:
    """Denoising score matching: the mean of weight * |D(x, sigma) - x0|^2. Eq. 5 and Eq. 7 are one
    function: fake and degrading teacher are trained alike, on the student's samples x0 [n, ...],
    from different starts. sigma > 0 and weight broadcast against x0; eps ~ N(0, 1) may be given."""
    assert not x0.requires_grad
    x = x0 + sigma * (torch.randn_like(x0) if eps is None else eps)
    return (weight * (net(x, sigma, cond) - x0) ** 2).mean()


def vsd_gradient(x0: Tensor, sigma: Tensor, d_fake: Tensor, d_target: Tensor,
                 weighting: str) -> Tensor:
    """Eq. 8's w(sigma) * (s_fake - s_target), the gradient with respect to x0 [n, ...].

    At one x the scores differ by (D_fake - D_target) / sigma^2, so that w = 1 is "score", sigma
    "eps", sigma^1.5 "half" (between its neighbours), sigma^2 "x0" (Diff-Instruct) and
    sigma^2 / mean|x0 - D_target| "dmd" (DMD2)."""
    difference = d_fake - d_target
    if weighting == "dmd":
        return difference / (x0 - d_target).abs().mean(dim=tuple(range(1, x0.dim())), keepdim=True)
    return difference / sigma ** {"score": 2, "eps": 1, "half": 0.5, "x0": 0}[weighting]


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


def update_score_model(net: Callable, optimizer: torch.optim.Optimizer, parts: Sequence[tuple],
                       weight: Callable[[Tensor], Tensor | float] = lambda sigma: 1.0) -> Tensor:
    """One update of a score network on a batch in equal parts (x0, sigma, cond, eps): Eq. 5 for the
    fake, Eq. 7 for the degrading teacher. Returns the loss, without a gradient."""
    total = torch.zeros((), device=parts[0][0].device)
    for x0, sigma, cond, eps in parts:
        loss = score_matching_loss(net, x0, sigma, cond, weight(sigma), eps) / len(parts)
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()  # at once: the gradients of one network at a time are in memory
    return total


def update_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * net, in place, of parameters, not of buffers."""
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(net.parameters()), None)


def must_fit(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """ValueError where a name, shape or kind of number is not `net`'s, or not all are finite."""
    own = net.state_dict()
    here, there = ({f"{name} {list(w.shape)}" + (not w.is_floating_point()) * f" {w.dtype}"
                    for name, w in state.items()} for state in (own, weights))
    if here != there:
        lacks, has = (f"{sorted(odd)[:2]} ({len(odd)})" for odd in (here - there, there - here))
        raise ValueError(f"it lacks {lacks} and has {has}")
    if bad := [n for n, w in weights.items() if not w.to(own[n].dtype).float().isfinite().all()]:
        raise ValueError(f"not finite: {', '.join(bad)}")


def load_strictly(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy `weights` over all those of `net`, in place; ValueError where they do not fit."""
    must_fit(net, weights)
    net.load_state_dict(weights, strict=True)


class DegradationPath:
    """A recorded path: node 0 is the teacher, the last node the most degraded. Raises Refusal where
    a file is missing or broken. load_node(file, net) reads a node that is not stored whole."""

    def __init__(self, folder: str | pathlib.Path, load_node: Callable | None = None):
        self.folder = pathlib.Path(folder)
        self.load_node = load_node or (lambda file, net: load_strictly(net, load_file(file)))
        file = self.folder / "path.json"
        try:
            self.about = dict(json.loads(file.read_text()))
            count, farthest = len(self.about["steps"]), float(self.about["positions"][-1])
            self.mean_gap = farthest / (count - 1)
            if not 0 <= self.mean_gap < float("inf"):
                raise ValueError(f"the last position is {farthest}")
            self.files = [self.folder / f"{node:02d}.safetensors" for node in range(count)]
            for file in self.files:
                safe_open(file, "pt")  # reads names and shapes alone
        except PermissionError:
            raise
        except Exception as error:
            raise Refusal(f"{file} is missing or broken: record the path with degrade.py, or name "
                          f"another path ({type(error).__name__}: {error})") from error

    @classmethod
    def create(cls, folder: pathlib.Path, nodes: Sequence[pathlib.Path],
               **about: Any) -> "DegradationPath":
        """Number the nodes' files, teacher first, and write path.json; Refusal if it is there."""
        if (folder / "path.json").exists():
            raise Refusal(f"{folder} holds a path already: record into another folder")
        for i, node in enumerate(nodes):
            numbered = folder / f"{i:02d}.safetensors"
            if node.exists() or not numbered.exists():  # else a run killed here has renamed it
                node.replace(numbered)
        beside = folder / "path.json.unfinished"
        beside.unlink(missing_ok=True)  # a killed run's, or a link to elsewhere
        beside.write_text(json.dumps(about, indent=1) + "\n")
        beside.replace(folder / "path.json")
        return cls(folder)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, node: int, net: nn.Module) -> None:
        """Copy a node's weights over those of `net`, in place: exactly, or Refusal."""
        file = self.files[node]
        try:
            if json.loads((self.folder / "path.json").read_text()) != self.about:
                raise ValueError("its folder holds another path meanwhile")
            self.load_node(file, net)
        except (OSError, SafetensorError, ValueError) as error:
            raise Refusal(f"{file} is broken or another network's, record anew: {error}") from None


class PathScheduler:
    """The scheduler of Algorithm 2: the target visits nodes N-1, ..., 1, 0 and then stays at 0.

    `target` holds the teacher's weights; a switch copies a node's over them. No path: plain VSD. A
    node lasts `interval` iterations; if `adaptive`, until an interval's mean mismatch is at most
    1/N of the last node's distance from the teacher, as the fake has caught up, or 10 intervals."""

    def __init__(self, path: DegradationPath | None, target: nn.Module, interval: int,
                 adaptive: bool = False):
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
        # Differs from Algorithm 2, whose nodes all last equally long: "adaptive" awaits the fake.
        if self.adaptive and self.age < 10 * self.interval and mean > self.path.mean_gap:
            return False
        self.node, self.age = self.node - 1, 0
        self.path.load(self.node, self.target)
        return True

    def state_dict(self) -> dict:
        return {"node": self.node, "age": self.age, "mismatch": self.mismatch}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there; the target gets its node's weights."""
        self.node, self.age, self.mismatch = state["node"], state["age"], state["mismatch"]
        if self.path:
            self.path.load(self.node, self.target)
