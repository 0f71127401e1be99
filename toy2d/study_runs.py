"""Runs of the study, many at once: one seed of one arm at several learning rates. Each is the run
that degrade.py and backtrack.py would make with that seed and those rates, draw for draw.

The runs share the student's start, the path, the target and all random numbers. Only the weights
of students and fakes differ: they are stacked, and a batch is the runs' batches one after another.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import backtrack
import degrade
import disback
from runtime import files, results
from runtime.interface import Problem
from runtime.study import Rates, first_reach, quiet, words
from toy2d import metrics, mixture, model
from toy2d.problem import RING as PRESET

# Where a run is measured, in shares of its iterations: often while it comes home.
SHARES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.37, 0.45, 0.55, 0.7, 0.85, 1)
LEVELS = 0.5, 0.3, 0.2  # of SWD; a line tells when each is reached


class Measure(metrics.Evaluation):
    """Fewer samples than the stage's: two sets of data are 0.10 apart, not 0.05."""

    samples, projections = 2000, 32


class Stack(nn.Module):
    """A perceptron's copies, one a run: from x [runs * n, inputs] to [runs * n, outputs]."""

    def __init__(self, net: model.Perceptron, runs: int):
        super().__init__()
        self.runs, layers = runs, [layer for layer in net if isinstance(layer, nn.Linear)]
        self.weights = nn.ParameterList([one.weight.detach().T.repeat(runs, 1, 1)
                                         for one in layers])
        self.biases = nn.ParameterList([one.bias.detach().repeat(runs, 1, 1) for one in layers])

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (self.runs, -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, nn.functional.silu(x) if i else x, weight)
        return x.flatten(0, 1)


def stacked(net: nn.Module, runs: int) -> nn.Module:
    """A student or a denoiser with a stack in the place of its perceptron."""
    net = copy.deepcopy(net)
    net.net = Stack(net.net, runs)
    return net


class Adam:
    """Adam without momentum on stacked weights, each run at its own rate, which falls with a cosine
    over `updates`, the number of all; `k` of them see the same rate."""

    def __init__(self, net: nn.Module, rates: list[float], beta2: float, steps: int, k: int = 1):
        self.weights, self.beta2, self.steps, self.k = list(net.parameters()), beta2, steps, k
        self.rates, self.count = torch.tensor(rates)[:, None, None], 0
        self.squares = [torch.zeros_like(weight) for weight in self.weights]

    @torch.no_grad()
    def step(self) -> None:
        decay = (1 + math.cos(math.pi * (self.count // self.k) / self.steps)) / 2
        self.count += 1
        correction = (1 - self.beta2**self.count) ** 0.5
        for weight, square in zip(self.weights, self.squares):
            square.mul_(self.beta2).addcmul_(weight.grad, weight.grad, value=1 - self.beta2)
            size = square.sqrt().add_(1e-8 * correction)
            weight.sub_(weight.grad.div_(size).mul_(self.rates * (decay * correction)))

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


class Runs:
    """The networks of backtrack.py, stacked, and its iteration."""

    def __init__(self, args: Any, problem: Problem, path: disback.DegradationPath | None,
                 rates: tuple[Rates, ...]):
        config, self.problem, self.runs = problem.config, problem, len(rates)
        assert config.beta1 == 0 and config.weight_decay == 0 and config.decay == "cosine"
        assert config.switch == "interval" or self.runs == 1  # a mismatch is the mean of all
        self.teacher, fake = copy.deepcopy(problem.teacher), copy.deepcopy(problem.teacher)
        if args.fake_init == "degraded":
            path.load(len(path) - 1, fake)
        self.student, self.fake = stacked(problem.student, self.runs), stacked(fake, self.runs)
        self.average = copy.deepcopy(self.student)
        self.scheduler = disback.PathScheduler(path if args.target == "path" else None,
                                               problem.teacher, config.interval,
                                               config.switch == "adaptive")
        of_student, of_fake = zip(*rates)
        steps, k = config.backtrack_steps, config.fake_updates
        # Stacked as the fake is: where both have the same weights, their answers are the same bits.
        self.target = stacked(problem.teacher, self.runs)
        self.adam_student = Adam(self.student, of_student, config.beta2, steps)
        self.adam_fake = Adam(self.fake, of_fake, config.beta2, steps, k)

    def each(self, drawn: Tensor) -> Tensor:
        """The same random numbers for every run."""
        return drawn.repeat(self.runs, 1)

    def iterate(self) -> None:
        """An update of every student (Eq. 8), and of every fake (Eq. 5). A mean over all runs is
        taken `runs` times: each has the gradient that it has alone."""
        problem, config = self.problem, self.problem.config
        z, _ = problem.sample_inputs(config.batch)
        sigma, eps = problem.sample_sigma_vsd(config.batch), torch.randn_like(z)
        x0 = self.student(self.each(z))
        loss, mismatch = disback.vsd_loss(x0, self.each(sigma), self.fake, self.target, None,
                                          config.weighting, self.each(eps))
        (self.runs * loss).backward()
        self.adam_student.step()
        self.adam_student.zero_grad()
        disback.update_average(self.average, self.student, config.ema)
        for i in range(config.fake_updates):
            self.update_fake(x0.detach() if i == 0 else None)
        if self.scheduler.step(mismatch):
            self.target = stacked(problem.teacher, self.runs)

    def update_fake(self, x0: Tensor | None) -> None:
        """On samples x0, or on fresh ones."""
        problem, n = self.problem, self.problem.config.batch
        if x0 is None:
            with torch.no_grad():
                x0 = self.student(self.each(problem.sample_inputs(n)[0]))
        sigma = problem.sample_sigma(n)
        eps = torch.randn(n, x0.shape[1])
        disback.update_score_model(
            self.fake, self.adam_fake, [(x0, self.each(sigma), None, self.each(eps))],
            lambda sigma: self.runs * problem.score_weight(sigma))


class Watch:
    """What is measured of the runs on the way, with random numbers of its own."""

    def __init__(self, runs: Runs, data: mixture.Mixture):
        self.runs, self.data, self.measure = runs, data, Measure(data)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.z, self.sigma = torch.randn(500, data.dims), runs.problem.sample_sigma(500)
            self.eps = torch.randn(500, data.dims)

    @torch.no_grad()
    def swd(self) -> list[float]:
        x0 = self.runs.average(self.runs.each(self.measure.z))
        return [self.measure.swd(one) for one in x0.unflatten(0, (self.runs.runs, -1))]

    @torch.no_grad()
    def final(self) -> dict[str, list[float]]:
        """The stage's own metrics, on its 10,000 samples."""
        whole = metrics.Evaluation(self.data)
        x0 = self.runs.average(self.runs.each(whole.z)).unflatten(0, (self.runs.runs, -1))
        found = [whole.of(one) for one in x0]
        return {name: [one[name] for one in found] for name in ("swd", "off_mode", "mode_tv")}

    @torch.no_grad()
    def mechanism(self) -> dict[str, list[float]]:
        """Of the students' samples: their spread over the data's, how far their mean is from the
        origin, the bias of the fake's answers, the error of the teacher's; the last two in the unit
        of disback.distance. A fake that knows them answers the right mean: its bias is 0."""
        runs, data = self.runs, self.data
        sigma, x0 = runs.each(self.sigma), runs.student(runs.each(self.z))
        x = x0 + sigma * runs.each(self.eps)
        bias = (runs.fake(x, sigma) - x0) / (sigma + 0.5)
        error = (runs.teacher(x, sigma) - data.denoise(x, sigma)).abs() / (sigma + 0.5)
        own, lag, error = (part.unflatten(0, (runs.runs, -1)) for part in (x0, bias, error))
        extent = (data.weights[:, None] * (data.means**2 + data.stds**2)).sum().sqrt()
        return {"spread": (own.var(dim=1).sum(dim=1).sqrt() / extent).tolist(),
                "away": own.mean(dim=1).norm(dim=1).tolist(),
                "bias": lag.mean(dim=1).norm(dim=1).tolist(),
                "teacher": error.mean(dim=(1, 2)).tolist()}


def record(out: Path, flags: dict, control: str | None) -> float:
    """Stage 1, and what a control makes of its path; the evaluations that it took.

    "forward": the nodes between the ends in the other order. "interpolated": they lie on the
    straight line in weight space, at equal distances. "wait": all of them are the last node, at
    which the student stays until the target is the teacher."""
    degrade.main(["toy2d", "--out", str(out), *words(flags)])
    path = disback.DegradationPath(out / "path")
    nodes = [load_file(file) for file in path.files]
    last = len(nodes) - 1
    if control == "forward":
        nodes[1:last] = nodes[last - 1:0:-1]
    if control == "interpolated":
        nodes[1:last] = [{name: torch.lerp(nodes[0][name], nodes[last][name], i / last)
                          for name in nodes[0]} for i in range(1, last)]
    if control == "wait":
        nodes[1:last] = [nodes[last]] * (last - 1)
    for file, weights in zip(path.files, nodes):
        files.save_tensors(file, weights)
    return path.about["network_evals"]


def advance(out: Path, cell: dict, arm: dict, seed: int, rates: tuple[Rates, ...], budget: int,
            drawn: Rates | None = None) -> dict:
    """Both stages of all runs, in the folder `out`, and what was measured of them, in the order of
    `rates`. `cell` and `arm` have the flags of both stages under "both", of one under "stage1" and
    "stage2"; `budget` is in iterations of plain VSD, and pays stage 1 as well. "reach" has the
    shares of stage 2 after which SWD is first at each of LEVELS; curves are of `drawn` alone."""
    both = {"seed": seed} | cell.get("both", {})
    later, stage1 = cell.get("stage2", {}) | arm.get("stage2", {}), 0
    with quiet():
        if "stage1" in arm:
            stage1 = record(out, both | arm["stage1"], arm.get("control"))
        plain = both.get("batch", PRESET.batch)
        cost = plain * (4 + 4 * later.get("fake_updates", 1))
        steps = int((8 * plain * budget - stage1) / cost)
        args, problem, path = backtrack.prepare(
            ["toy2d", "--out", str(out), *words(both | later | {"steps": steps})])
    assert cost == results.evals_an_iteration(problem)
    runs, data = Runs(args, problem, path, rates), getattr(mixture, problem.config.data)()
    watch, found = Watch(runs, data), []
    problem.snapshot()  # draws random numbers, as the stage does
    points = sorted({max(1, round(share * steps)) for share in SHARES})
    for step in range(1, steps + 1):
        runs.iterate()
        if step in points:
            found.append({"swd": watch.swd()} | (watch.mechanism() if drawn in rates else {}))
    curves = {name: [list(curve) for curve in zip(*(point[name] for point in found))]
              for name in found[0]}
    reach = [[first_reach([point / steps for point in points], curve, level) for level in LEVELS]
             for curve in curves["swd"]]
    return {"steps": steps, "stage1": stage1 / (8 * plain * budget), "final": watch.final(),
            "reach": reach, **only(drawn, rates, curves)}


def only(drawn: Rates | None, rates: tuple[Rates, ...], curves: dict[str, list]) -> dict:
    """The curves at the rates that are drawn, and None in the places of the others."""
    return {name: [curve if pair == drawn else None for pair, curve in zip(rates, of_name)]
            for name, of_name in curves.items()} if drawn in rates else {}
