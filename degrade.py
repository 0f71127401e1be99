"""Stage 1, Degradation Recording (Algorithm 1): train a copy of the teacher on the samples of the
initial, frozen student, and keep nodes of the path that it takes."""

import copy
import dataclasses
import time

import torch
from tqdm import trange

import disback


def main(argv: list[str]) -> None:
    args, problem = disback.start("degrade", __doc__, argv)
    config, batch, steps = problem.config, problem.config.batch, problem.config.degrade_steps
    disback.node_steps(config.spacing, config.nodes, steps)  # refuses more nodes than steps
    disback.claim(args, "degrade", ("path", *disback.RESULTS), dataclasses.asdict(config))

    degraded = copy.deepcopy(problem.teacher)  # s'_theta, which forgets on the way to the student
    optimizer = torch.optim.AdamW(degraded.parameters(), betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)

    def sample_student():
        z, cond = problem.sample_inputs(batch)
        with torch.no_grad():
            x0 = problem.generate(problem.student, z, cond)
        return x0, problem.sample_sigma(batch), cond

    x0, sigma, cond = sample_student()
    probe = (x0 + sigma * torch.randn_like(x0), sigma, cond)
    recorder = disback.Recorder(args.out / "path", problem.teacher, config.nodes, steps,
                                probe, config.spacing)

    began, total = time.perf_counter(), 0.0
    progress = trange(1, steps + 1, desc="degrade")
    for step in progress:
        x0, sigma, cond = sample_student()
        weight = problem.score_weight(sigma)
        loss = disback.score_matching_loss(degraded, x0, sigma, cond, weight)  # Eq. 7
        disback.update(optimizer, loss, config.lr_degrade)
        recorder.offer(degraded, step)

        total += loss.detach()
        if step % config.log_every == 0 or step == steps:
            mean, total = float(total) / ((step - 1) % config.log_every + 1), 0.0
            disback.log(args.out / "path" / "log.jsonl", step, "degrading", loss=mean)
            progress.set_postfix(loss=f"{mean:.3g}")

    # In forwards of the network a step costs 4: the student's, and a forward and a backward of 3.
    recorder.close(**problem.about, spacing=config.spacing, seconds=time.perf_counter() - began,
                   network_evals=(1 + 4 * steps) * batch + recorder.evals)


if __name__ == "__main__":
    disback.run(main)
