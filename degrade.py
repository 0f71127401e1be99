"""Stage 1, Degradation Recording (Algorithm 1): train a copy of the teacher on the samples of the
initial, frozen student, and keep nodes of the path that it takes."""

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import disback


class Recorder:
    """Writes nodes of a model while it is trained; node 0 is the teacher, node N the last state.

    "linear" and "log" space the others in steps. "arc" spaces them equally in disback.distance
    from the teacher on `samples`, the student's noised ones as (x, sigma, cond) for each part of a
    batch: it writes candidates at 4N log-spaced steps and drops the most crowded. pack(net) are
    the tensors to store of a node after the first. `kept` is what a resumed recorder needs.
    """

    def __init__(self, folder: str | Path, teacher: torch.nn.Module, nodes: int, steps: int,
                 samples: Sequence[tuple], spacing: str = "arc",
                 pack: Callable[[torch.nn.Module], dict] | None = None, resume: bool = False):
        self.folder, self.nodes, self.samples = Path(folder), nodes, samples
        self.pack = pack or torch.nn.Module.state_dict
        assert 1 <= nodes <= steps
        count = min(4 * nodes, steps) if spacing == "arc" else nodes
        self.candidates = {0, *(round(steps * i / count) if spacing == "linear" else
                                max(i, int(steps ** (i / count))) for i in range(1, count + 1))}
        self.kept: list[tuple[float, int, str]] = []  # position, step and file of a candidate
        self.dropped = ""  # a file that the last checkpoint may still want
        self.d_teacher = self._answers(teacher)
        if not resume:
            self._keep(0.0, 0, teacher.state_dict())

    def offer(self, net: torch.nn.Module, step: int) -> bool:
        """Call after every step, counted from 1: writes a copy of `net` where one is due. True
        where it drops another, whose file goes at the next call: save a checkpoint between."""
        if self.dropped and disback.rank() == 0:
            (self.folder / self.dropped).unlink(missing_ok=True)
        self.dropped = ""
        if step in self.candidates:
            distances = [disback.distance(d, d_teacher, sigma) for d, d_teacher, (_, sigma, _)
                         in zip(self._answers(net), self.d_teacher, self.samples)]
            position = disback.mean_over_ranks(torch.stack(distances).mean()).item()
            self._keep(position, step, self.pack(net))
            if len(self.kept) > 2 * self.nodes:
                self.dropped = self._drop()
        return bool(self.dropped)

    def close(self, **about: object) -> disback.Path:
        """Thin to N + 1 nodes, number them, write path.json with `about` as well, and open it."""
        assert self.kept[-1][1] == max(self.candidates), "every step must be offered"
        while len(self.kept) > self.nodes + 1:
            self._drop()
        positions, steps, names = zip(*self.kept)
        if disback.rank() == 0:
            for file in self.folder.glob("step-*.safetensors"):
                if file.name not in names:
                    file.unlink()
        return disback.Path.create(self.folder, [self.folder / name for name in names],
                                   steps=steps, positions=positions, **about)

    @torch.no_grad()
    def _answers(self, net: torch.nn.Module) -> list[torch.Tensor]:
        return [net(*part) for part in self.samples]

    def _keep(self, position: float, step: int, weights: dict) -> None:
        disback.save_tensors(self.folder / f"step-{step}.safetensors", weights)
        disback.log(self.folder / "log.jsonl", step, "degrading", position=position)
        self.kept.append((position, step, f"step-{step}.safetensors"))

    def _drop(self) -> str:
        at = [position for position, _, _ in self.kept]
        crowded = min(range(1, len(at) - 1), key=lambda i: at[i + 1] - at[i - 1])
        return self.kept.pop(crowded)[2]


def main(argv: list[str]) -> None:
    args, problem = disback.start("degrade", __doc__, argv)
    config, batch, steps = problem.config, problem.config.batch, problem.config.degrade_steps
    out, state, began = args.out / "path", args.out / "path" / "state.pt", time.perf_counter()
    if args.resume and (out / "path.json").exists():
        path = disback.Path(out, problem.about, problem.unpack)
        if disback.rank() == 0:
            state.unlink(missing_ok=True)
            print(f"{out} is recorded already, {len(path) - 1} nodes: --overwrite records it again")
        return
    degraded = copy.deepcopy(problem.teacher)  # s'_theta, which forgets on the way to the student
    for net in (problem.teacher, problem.student):
        disback.ready(net, args, problem.blocks)
    trained = disback.ready(degraded, args, problem.blocks, trained=True)
    optimizer = torch.optim.AdamW(degraded.parameters(), betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)
    nets, optimizers = {"degraded": degraded}, {"degraded": optimizer}

    def draw():
        z, cond = problem.sample_inputs(batch)
        drawn = z, cond, problem.sample_sigma(batch), torch.randn_like(z)
        for z_i, cond_i, sigma_i, eps_i in disback.share(batch, args.accumulate, *drawn):
            with torch.no_grad():
                x0 = problem.generate(problem.student, z_i, cond_i)
            yield x0, sigma_i, cond_i, eps_i

    samples = [(x0 + sigma * eps, sigma, cond) for x0, sigma, cond, eps in draw()]
    settings, done, seconds = problem.about | dataclasses.asdict(config), 0, 0.0
    if not args.resume:
        disback.claim(args, problem, "degrade", {})
    recorder = Recorder(out, degraded, config.nodes, steps, samples, config.spacing, problem.pack,
                        args.resume)
    if args.resume:
        then = disback.load_state(state, nets, optimizers, settings)
        done, seconds, recorder.kept = then["step"], then["seconds"], then["kept"]
        del then  # else a second copy of it all stays
    progress = tqdm(range(done + 1, steps + 1), "degrade", steps, initial=done,
                    disable=disback.rank() > 0)
    for step in disback.stoppable(progress):
        total = 0.0
        for x0, sigma, cond, eps in draw():
            loss = disback.score_matching_loss(  # Eq. 7
                trained, x0, sigma, cond, problem.score_weight(sigma), eps) / args.accumulate
            loss.backward()
            total = total + loss.detach()
        disback.update(optimizer, config.lr_degrade, problem.clip)
        save = recorder.offer(degraded, step) or step % config.save_every == 0 or step == steps
        if step % config.log_every == 0 or step == steps:
            number = disback.mean_over_ranks(total).item()
            disback.log(out / "log.jsonl", step, "degrading", loss=number)
            progress.set_postfix(loss=f"{number:.3g}")
        if (stop := disback.stop_asked()) or save:
            disback.save_state(state, step, nets, optimizers, settings=settings, kept=recorder.kept,
                               seconds=seconds + time.perf_counter() - began)
        if stop:
            sys.exit(f"stopped by {stop} after step {step}: --resume goes on from there")

    # In forwards of the network a step costs 4, the student's and the degrading teacher's, whose
    # backward counts 2; a candidate costs 1.
    recorder.close(**problem.about, spacing=config.spacing,
                   seconds=seconds + time.perf_counter() - began,
                   network_evals=(1 + 4 * steps + len(recorder.candidates)) * batch)
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    disback.run(main)
