"""What the methods share. x = x0 + sigma * eps, and networks of the plane answer D(x, sigma, cond)
-> x0; points are [n, 2], sigma is [n, 1] from LO to HI. Costs are in forwards of a network on one
sample; a backward counts 2."""

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import disback
from degrade import Recorder
from toy2d import metrics, mixture, problem

HI, LO, BATCH = 20.0, 0.02, 512
STAGE1 = 822  # the cost of stage 1 for a sample of the batch: 200 steps of 4, and the nodes


class Toy:
    """The setting of a run. backtrack: the target walks; rate: a factor of all learning rates."""

    def __init__(self, seed: int, backtrack: bool = False, rate: float = 1.0, data: str = "ring"):
        torch.set_num_threads(1)
        self.seed, self.backtrack, self.rate = seed, backtrack, rate
        self.config = problem.Config(data=data, sigma_data=1.0, sigma_min=LO, sigma_max=HI)
        self.data, self.folder = getattr(mixture, data)(), tempfile.TemporaryDirectory()
        self.teacher = problem.trained_teacher(self.config, self.data)[0].requires_grad_(False)
        self.evaluate = metrics.Evaluation(self.data)
        torch.manual_seed(seed)

    def sigma(self, n: int = BATCH) -> Tensor:
        return problem.karras_sigma(n, self.config)

    def copy(self) -> nn.Module:
        """The teacher's weights, to be trained."""
        return copy.deepcopy(self.teacher).requires_grad_()

    def adam(self, net: nn.Module, lr: float, beta1=0.0, beta2=0.999) -> torch.optim.Optimizer:
        weights = [weight for weight in net.parameters() if weight.requires_grad]
        return torch.optim.Adam(weights, lr * self.rate, (beta1, beta2), fused=True)

    def steps(self, n: int, cost: float, stage1: float = STAGE1) -> int:
        """n iterations that cost so much a sample; without a path also what stage 1 would cost."""
        return n if self.backtrack else n + round(stage1 / cost)

    def nets(self, draw: Callable, fake: nn.Module | None = None, interval: int = 10,
             **stage1: Callable) -> tuple[nn.Module, nn.Module, disback.PathScheduler]:
        """Target, fake and scheduler. The fake starts as the teacher; with a path, stage 1 degrades
        it on draw(n) -> (x0, cond), samples of the initial student, and the target walks."""
        fake = fake or self.copy()
        target = copy.deepcopy(fake).requires_grad_(False)
        path = degrade(self, draw, fake, **stage1) if self.backtrack else None
        return target, fake, disback.PathScheduler(path, target, interval)

    @torch.no_grad()
    def measure(self, sample: Callable) -> dict[str, float]:
        """The metrics of sample(z, generator) from fixed noise."""
        return self.evaluate.of(sample(self.evaluate.z, torch.Generator().manual_seed(2)))


@dataclasses.dataclass
class Result:
    """What train(toy) returns: sample(z, generator) -> x0 where there is one, other samplers that
    are to be measured, other numbers, and tensors for the figure."""

    sample: Callable | None = None
    others: dict[str, Callable] = dataclasses.field(default_factory=dict)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def degrade(toy: Toy, draw: Callable, net: nn.Module, loss: Callable | None = None,
            pack: Callable = nn.Module.state_dict,
            load: Callable | None = None) -> disback.DegradationPath:
    """Stage 1: train `net` in place on samples draw(n) -> (x0, cond), and record 10 nodes."""
    draw, adam, sigma = torch.no_grad()(draw), toy.adam(net, 2e-3), toy.sigma()
    (x0, cond), folder = draw(BATCH), tempfile.mkdtemp(dir=toy.folder.name)
    noised = [(x0 + sigma * torch.randn_like(x0), sigma, cond)]
    recorder = Recorder(folder, net, 10, 200, noised, pack=pack)
    for step in range(1, 201):
        x0, cond = draw(BATCH)
        update(adam, (loss or dsm)(net, x0, toy.sigma(), cond))
        recorder.offer(net, step)
    return disback.DegradationPath(recorder.close().folder, load)


def dsm(net: Callable, x0: Tensor, sigma: Tensor, cond=None, eps: Tensor | None = None) -> Tensor:
    """Denoising score matching with EDM's weight."""
    return disback.score_matching_loss(net, x0, sigma, cond, problem.score_weight(sigma, 1.0), eps)


def vsd(x0: Tensor, sigma: Tensor, fake: Callable, target: Callable, weighting="eps", cond=None,
        eps: Tensor | None = None, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """disback.vsd_loss with its gradient times `scale` [n, 1], and the mismatch degree."""
    x0 = scale * x0 + (1 - scale) * x0.detach()  # the same points
    return disback.vsd_loss(x0, sigma, fake, target, cond, weighting, eps)


def loop(steps: int, *optimizers: torch.optim.Optimizer) -> Iterator[int]:
    """0 ... steps - 1, while the rates fall to 0 by a cosine."""
    rates = [adam.param_groups[0]["lr"] for adam in optimizers]
    for i in range(steps):
        for adam, rate in zip(optimizers, rates):
            adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * i / steps)) / 2
        yield i


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def average(net: nn.Module, decay: float = 0.95) -> AveragedModel:
    """A moving average; call its update_parameters(net) after every update."""
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
