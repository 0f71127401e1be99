"""Stage 1, Degradation Recording (Algorithm 1): train a copy of the teacher on the samples of the
initial, frozen student, and keep nodes of the path that it takes."""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import trange

import disback


class Recorder:
    """Writes nodes of a model while it is trained; node 0 is the teacher, node N the last state.

    Between, "linear" and "log" space them in steps, "arc" equally in disback.distance from the
    teacher on `samples` (x0, sigma, cond) of the student, noised once: of 4N log-spaced steps it
    drops the most crowded. pack(net) are the tensors to store of a node after the first. No second
    model is in memory; `evals` counts the forwards.
    """

    def __init__(self, folder: str | Path, teacher: torch.nn.Module, nodes: int, steps: int,
                 samples: tuple, spacing: str = "arc",
                 pack: Callable[[torch.nn.Module], dict] | None = None):
        self.folder, self.nodes, (x0, sigma, cond) = Path(folder), nodes, samples
        self.probe, self.evals = (x0 + sigma * torch.randn_like(x0), sigma, cond), 0
        self.pack = pack or torch.nn.Module.state_dict
        assert 1 <= nodes <= steps
        looks = min(4 * nodes, steps) if spacing == "arc" else nodes
        self.looks = {0, *(round(steps * i / looks) if spacing == "linear" else
                           max(i, int(steps ** (i / looks))) for i in range(1, looks + 1))}
        self.kept: list[tuple[float, int, Path]] = []  # position, step and file of a candidate
        self.offer(teacher, 0)

    @torch.no_grad()
    def offer(self, net: torch.nn.Module, step: int) -> None:
        """Call after every step, counted from 1: writes a copy of `net` where one is due."""
        if step not in self.looks:
            return
        answer = net(*self.probe)
        self.evals += len(answer)
        self.d_teacher = answer if step == 0 else self.d_teacher
        position = disback.distance(answer, self.d_teacher, self.probe[1]).item()
        file = self.folder / f"step-{step}.safetensors"
        disback.save_tensors(file, self.pack(net) if step > 0 else net.state_dict())
        disback.log(self.folder / "log.jsonl", step, "degrading", position=position)
        self.kept.append((position, step, file))
        self._thin(2 * self.nodes)

    def close(self, **about: object) -> disback.Path:
        """Thin to N + 1 nodes, number them, write path.json with `about` as well, and open it."""
        assert self.kept[-1][1] == max(self.looks), "every step must be offered"
        self._thin(self.nodes + 1)
        positions, steps, files = zip(*self.kept)
        return disback.Path.create(self.folder, files, steps=steps, positions=positions, **about)

    def _thin(self, most: int) -> None:
        while len(self.kept) > most:
            at = [position for position, _, _ in self.kept]
            crowded = min(range(1, len(at) - 1), key=lambda i: at[i + 1] - at[i - 1])
            self.kept.pop(crowded)[2].unlink()


def main(argv: list[str]) -> None:
    args, problem = disback.start("degrade", __doc__, argv)
    config, batch, steps = problem.config, problem.config.batch, problem.config.degrade_steps
    degraded = copy.deepcopy(problem.teacher)  # s'_theta, which forgets on the way to the student
    optimizer = torch.optim.AdamW(degraded.parameters(), betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)

    def sample_student():
        z, cond = problem.sample_inputs(batch)
        with torch.no_grad():
            x0 = problem.generate(problem.student, z, cond)
        return x0, problem.sample_sigma(batch), cond

    samples = sample_student()
    disback.claim(args, problem, "degrade", {})
    out, began = args.out / "path", time.perf_counter()
    recorder = Recorder(out, problem.teacher, config.nodes, steps, samples, config.spacing,
                        problem.pack)
    for step in (progress := trange(1, steps + 1, desc="degrade")):
        x0, sigma, cond = sample_student()
        loss = disback.score_matching_loss(  # Eq. 7
            degraded, x0, sigma, cond, problem.score_weight(sigma))
        disback.update(optimizer, loss, config.lr_degrade, problem.clip)
        recorder.offer(degraded, step)
        if step % config.log_every == 0 or step == steps:
            disback.log(out / "log.jsonl", step, "degrading", loss=loss.item())
            progress.set_postfix(loss=f"{loss.item():.3g}")

    # In forwards of the network a step costs 4: the student's, and a forward and a backward of 3.
    recorder.close(**problem.about, spacing=config.spacing, seconds=time.perf_counter() - began,
                   network_evals=(1 + 4 * steps) * batch + recorder.evals)


if __name__ == "__main__":
    disback.run(main)
