"""Stage 2, Distribution Backtracking (Algorithm 2): distil the student while the target walks back
along the recorded path, from the node before the last to the teacher."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import disback
from runtime import cli, command, files, place, ranks, results
from runtime.folder import open_path
from runtime.interface import Problem
from runtime.optimizers import adamw, decaying
from runtime.run import Run

FLAGS = dict(
    target=dict(choices=("path", "teacher"), default="path", help="teacher alone is plain VSD"),
    fake_init=dict(choices=("degraded", "teacher"), help="default: degraded if target is the path"),
    path=dict(type=command.path, metavar="DIR", help="folder of the path (default: OUT/path)"),
    compare=dict(type=command.path, metavar="DIR", help="a finished run to draw beside this one"))


class Networks:
    """Student and fake, which learn; the target, which walks; and the student's moving average.

    Only the target takes the nodes' weights: they are loaded over the teacher's own."""

    def __init__(self, args: Any, problem: Problem, path: disback.DegradationPath | None):
        self.problem, self.config = problem, problem.config
        self.student, self.target = problem.student, problem.teacher
        self.fake = copy.deepcopy(problem.teacher)
        # With --ema 0 the student is its own average: SDXL is spared 10 GB.
        self.average = copy.deepcopy(self.student) if self.config.ema > 0 else self.student
        for net in (self.student, self.fake, self.target):
            place.ready(net, args, problem.blocks)
        if self.average is not self.student:
            place.ready(self.average, args, problem.blocks, compiled=False)  # called seldom
        if args.fake_init == "degraded":
            path.load(len(path) - 1, self.fake)
        self.scheduler = disback.PathScheduler(path if args.target == "path" else None, self.target,
                                               self.config.interval,
                                               self.config.switch == "adaptive")
        self.guided = functools.partial(problem.guide, self.target)
        self.share = functools.partial(ranks.share, self.config.batch, args.accumulate)
        self.adams = {
            "student": adamw(self.student, self.config, self.config.lr_student, problem.clip),
            "fake": adamw(self.fake, self.config, self.config.lr_fake, problem.clip)}
        self.rates = {
            "student": decaying(self.adams["student"], self.config),
            "fake": decaying(self.adams["fake"], self.config, self.config.fake_updates)}

    def update_student(self) -> tuple[list[tuple], Tensor]:
        """One update by Eq. 8; the samples (x0, cond) in parts, and their mismatch degree."""
        n, problem = self.config.batch, self.problem
        z, cond = problem.sample_inputs(n)
        drawn = z, cond, problem.sample_sigma_vsd(n), torch.randn_like(z)
        parts, samples, mismatches = self.share(*drawn), [], []
        for z_i, cond_i, sigma, eps in parts:
            x0 = problem.generate(self.student, z_i, cond_i)
            loss, mismatch = disback.vsd_loss(x0, sigma, self.fake, self.guided, cond_i,
                                              self.config.weighting, eps)
            (loss / len(parts)).backward()
            samples.append((x0.detach(), cond_i))
            mismatches.append(mismatch)
        self.adams["student"].step()
        self.adams["student"].zero_grad()
        self.rates["student"].step()
        if self.average is not self.student:
            disback.update_average(self.average, self.student, self.config.ema)
        return samples, ranks.mean_over_ranks(sum(mismatches) * (1 / len(parts)))

    def fresh_samples(self) -> list[tuple]:
        """New samples (x0, cond) of the student, in parts."""
        z, cond = self.problem.sample_inputs(self.config.batch)
        with torch.no_grad():
            return [(self.problem.generate(self.student, *inputs), inputs[1])
                    for inputs in self.share(z, cond)]

    def update_fake(self, samples: list[tuple]) -> Tensor:
        """One update by Eq. 5 on the student's samples; the loss."""
        n, like = self.config.batch, samples[0][0]
        sigma = self.problem.sample_sigma(n)
        eps = torch.randn(n, *like.shape[1:], dtype=like.dtype, device=like.device)
        parts = [(x0, sigma_i, cond, eps_i)
                 for (x0, cond), (sigma_i, eps_i) in zip(samples, self.share(sigma, eps))]
        loss = disback.update_score_model(self.fake, self.adams["fake"], parts,
                                          self.problem.score_weight)
        self.rates["fake"].step()
        return loss


def prepare(argv: Sequence[str]) -> tuple[Any, Problem, disback.DegradationPath | None]:
    """The arguments, the problem, and the path, which plain VSD does without."""
    args, problem = cli.start("backtrack", __doc__, argv, **FLAGS)
    return args, problem, open_path(args.path, problem) if args.path else None


def distil(args: Any, problem: Problem, path: disback.DegradationPath | None) -> None:
    """The stage, of what `prepare` returns."""
    config, nets = problem.config, Networks(args, problem, path)
    kept, scheduler = problem.snapshot(), nets.scheduler
    run = Run("backtrack", args, problem,
              dict(student=nets.student, fake=nets.fake, ema=nets.average), nets.adams,
              dict(scheduler=scheduler, student=nets.rates["student"], fake=nets.rates["fake"]),
              target=args.target, fake_init=args.fake_init,
              path=path and files.sha256(path.folder / "path.json"))

    def snapshot(step: int) -> None:
        with torch.no_grad():
            x0 = problem.generate(nets.average, *kept)
        files.save_tensors(args.out / "snapshots" / f"{step:07d}.safetensors", {
            "x0": x0, "node": torch.tensor(scheduler.node),
            **problem.look(nets.student, nets.fake, nets.target)})

    if not args.resume:
        snapshot(0)
    for step in run.steps(config.backtrack_steps):
        samples, mismatch = nets.update_student()  # Eq. 8
        for i in range(config.fake_updates):  # Eq. 5
            loss = nets.update_fake(samples if i == 0 else nets.fresh_samples())
        run.count(loss_fake=loss, mismatch=mismatch)
        looks = problem.looks_at(step)
        if looks or run.logs_at(step):
            run.log(scheduler.node, seconds=run.seconds,
                    network_evals=results.evals_an_iteration(problem) * step,
                    **problem.evaluate(nets.average), **problem.diagnose(nets.student, nets.fake))
        if scheduler.step(mismatch) or looks or run.saves_at(step):
            snapshot(step)

    results.finish(args.out, problem, nets.average, path, args.compare, seconds=run.seconds,
                   method="disback" if args.target == "path" else "vsd",
                   fake_init=args.fake_init, node=scheduler.node)
    if scheduler.node > 0 and ranks.rank() == 0:
        print(f"note: the target is still node {scheduler.node}; a run of more --steps reaches "
              "the teacher")


def main(argv: Sequence[str]) -> None:
    distil(*prepare(argv))


if __name__ == "__main__":
    command.run(main, "lower --batch or the network's size, or raise --accumulate")
