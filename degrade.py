"""Stage 1, Degradation Recording (Algorithm 1): train a copy of the teacher on the samples of the
initial, frozen student, and keep nodes of the path that it takes."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

import disback


class Recorder:
    """Writes nodes of a network while it is trained; node 0 is the teacher, node N the last state.

    "linear" and "log" space the others in steps. "arc" spaces them equally in disback.distance
    from the teacher on `samples`, the student's noised ones as (x, sigma, cond) for each part of a
    batch: it writes 2N states at log-spaced steps and drops the most crowded in the end. pack(net)
    are the tensors of a node after the first, write(file, tensors) stores them."""

    def __init__(self, folder: str | Path, teacher: nn.Module, nodes: int, steps: int,
                 samples: Sequence[tuple], spacing: str = "arc",
                 pack: Callable = nn.Module.state_dict, write: Callable | None = None):
        assert 1 <= nodes <= steps and spacing in ("arc", "linear", "log"), (nodes, steps, spacing)
        self.folder, self.nodes, self.samples, self.pack = Path(folder), nodes, samples, pack
        if (self.folder / "path.json").exists():
            raise disback.Refusal(f"{folder} holds a path already: record into another folder")
        self.write = write or (lambda file, tensors: file.write_bytes(save({  # no views
            n: w.cpu().clone(memory_format=torch.contiguous_format) for n, w in tensors.items()})))
        count = min(2 * nodes, steps) if spacing == "arc" else nodes
        self.candidates = {0, *(round(steps * i / count) if spacing == "linear" else
                                max(i, int(steps ** (i / count))) for i in range(1, count + 1))}
        self.kept: list[tuple[int, float]] = []  # step and position of every state in the folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep(0, 0.0, teacher.state_dict())
        self.d_teacher = self._answers(teacher)

    def offer(self, net: nn.Module, step: int) -> None:
        """Call after every step, counted from 1: writes `net` where a candidate is due."""
        if step in self.candidates:
            distances = [disback.distance(d, d_teacher, sigma) for d, d_teacher, (_, sigma, _)
                         in zip(self._answers(net), self.d_teacher, self.samples)]
            self._keep(step, torch.stack(distances).mean().item(), self.pack(net))

    def close(self, **about: object) -> disback.DegradationPath:
        """Thin to N + 1 nodes, number them, write path.json with `about` as well, and open it."""
        assert {step for step, _ in self.kept} == self.candidates, "every step must be offered"
        while len(self.kept) > self.nodes + 1:
            at = [position for _, position in self.kept]
            crowded = min(range(1, len(at) - 1), key=lambda i: at[i + 1] - at[i - 1])
            self._file(self.kept.pop(crowded)[0]).unlink(missing_ok=True)
        steps, positions = zip(*self.kept)
        return disback.DegradationPath.create(self.folder, [self._file(step) for step in steps],
                                              steps=steps, positions=positions, **about)

    def state_dict(self) -> dict:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict) -> None:
        self.kept = state["kept"]

    @torch.no_grad()
    def _answers(self, net: nn.Module) -> list[Tensor]:
        return [net(*part) for part in self.samples]

    def _keep(self, step: int, position: float, weights: dict) -> None:
        self.write(self._file(step), weights)
        self.kept.append((step, position))

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"


def main(argv: list[str]) -> None:
    from runtime import cli, files, optimizers, place, ranks, results
    from runtime.run import Run
    args, problem = cli.start("degrade", __doc__, argv)
    config, batch, out = problem.config, problem.config.batch, args.out / "path"
    degraded = copy.deepcopy(problem.teacher)  # s'_theta, which forgets on the way to the student
    for net in (problem.teacher, problem.student, degraded):
        place.ready(net, args, problem.blocks)
    adam = optimizers.adamw(degraded, config, config.lr_degrade, problem.clip)

    def draw(cut: Callable) -> list[tuple]:
        """A batch of the student's samples in the parts (x0, sigma, cond, eps) that `cut` makes."""
        z, cond = problem.sample_inputs(batch)
        parts = cut(z, cond, problem.sample_sigma(batch), torch.randn_like(z))
        with torch.no_grad():
            return [(problem.generate(problem.student, z_i, cond_i), sigma, cond_i, eps)
                    for z_i, cond_i, sigma, eps in parts]

    # All ranks measure the path on the same samples, and so agree.
    whole = draw(lambda *drawn: ranks.split(batch, ranks.world_size() * args.accumulate, *drawn))
    run = Run("degrade", args, problem, {"degraded": degraded}, {"degraded": adam}, {})
    recorder = Recorder(out, degraded, config.nodes, config.degrade_steps,
                        [(x0 + sigma * eps, sigma, cond) for x0, sigma, cond, eps in whole],
                        config.spacing, problem.pack, files.save_tensors)
    run.others["recorder"] = recorder
    for step in run.steps(config.degrade_steps):
        parts = draw(lambda *drawn: ranks.share(batch, args.accumulate, *drawn))
        loss = disback.update_score_model(degraded, adam, parts, problem.score_weight)  # Eq. 7
        recorder.offer(degraded, step)
        run.count(loss=loss)
        if run.logs_at(step):
            run.log("degrading", seconds=run.seconds, position=recorder.kept[-1][1])

    if ranks.rank() == 0:
        recorder.close(**problem.about, spacing=config.spacing,
                       network_evals=results.evals_of_path(config, len(recorder.candidates)))
        (out / "state.pt").unlink(missing_ok=True)
        print(f"path: nodes 0 to {config.nodes} in {out}")
    ranks.barrier()


if __name__ == "__main__":
    from runtime import command

    command.run(main, "lower --batch or the network's size, or raise --accumulate")
