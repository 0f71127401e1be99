"""Stage 2, Distribution Backtracking (Algorithm 2): distil the student while the target walks back
along the recorded path, from the node before the last to the teacher."""

import copy
import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import disback

FLAGS = dict(
    target=dict(choices=("path", "teacher"), default="path", help="teacher alone is plain VSD"),
    fake_init=dict(choices=("degraded", "teacher"), help="default: degraded if target is the path"),
    path=dict(type=Path, metavar="DIR", help="folder of the path (default: OUT/path)"),
    compare=dict(type=Path, metavar="DIR", help="a finished run to draw beside this one"))


def main(argv: list[str]) -> None:
    args, problem = disback.start("backtrack", __doc__, argv, **FLAGS)
    config, batch, steps = problem.config, problem.config.batch, problem.config.backtrack_steps
    fake_init = args.fake_init or ("degraded" if args.target == "path" else "teacher")
    path = None if (args.target, fake_init) == ("teacher", "teacher") else disback.Path(
        args.path or args.out / "path", problem.about, problem.unpack)
    if args.compare:
        disback.load_json(args.compare / "metrics.json", "--compare takes a finished run")

    # Only the target walks: nodes are loaded over the teacher's own weights. The fake learns.
    student, target = problem.student, problem.teacher
    fake = copy.deepcopy(problem.teacher)
    ema = copy.deepcopy(student) if config.ema > 0 else student
    trained_student, trained_fake = (disback.ready(net, args, problem.blocks, trained=True)
                                     for net in (student, fake))
    disback.ready(target, args, problem.blocks)
    if ema is not student:  # it is called seldom, in batches of other sizes
        disback.ready(ema, args, problem.blocks, compiled=False)
    if fake_init == "degraded":
        path.load(len(path) - 1, fake)
    walk = disback.Walk(path if args.target == "path" else None, target, config.interval,
                        config.switch == "adaptive")
    guided, average = functools.partial(problem.guide, target), get_ema_multi_avg_fn(config.ema)
    weights, ema_weights = list(student.parameters()), list(ema.parameters())
    nets, shown = dict(student=student, fake=fake, ema=ema), disback.SplitOverRanks(ema)
    optimizers = {name: torch.optim.AdamW(nets[name].parameters(), weight_decay=config.weight_decay,
                                          betas=(config.beta1, config.beta2), fused=True)
                  for name in ("student", "fake")}

    state, log, snapshot_inputs = args.out / "state.pt", args.out / "log.jsonl", problem.snapshot()
    settings = {**problem.about, **dataclasses.asdict(config), "target": args.target,
                "fake_init": fake_init, "path": path and disback.sha256(path.folder / "path.json")}

    # In forwards of the network, an update of the student costs 5: its own forward, the backward's
    # 2, fake and target; one of the fake 3. Its first takes the student's samples, others draw new.
    k = config.fake_updates
    evals_a_step = batch * (4 + problem.guide_evals + 3 * k + (k - 1))
    share = functools.partial(disback.share, batch, args.accumulate)

    def snapshot(step):
        with torch.no_grad():
            x0 = problem.generate(shown, *snapshot_inputs)
        disback.save_tensors(args.out / "snapshots" / f"{step:07d}.safetensors",
                             {"x0": x0, "node": torch.tensor(walk.node)})

    done, since, seconds, totals = 0, 0, 0.0, torch.zeros(2, device=snapshot_inputs[0].device)
    if args.resume:
        then = disback.load_state(state, nets, optimizers, settings)
        done, since, seconds = then["step"], then["since"], then["seconds"]
        totals += then["totals"].to(totals)
        walk.node, walk.age, walk.mismatch = then["node"], then["age"], then["mismatch"]
        if walk.path:
            walk.path.load(walk.node, target)
        del then  # else a second copy of it all stays
    else:
        disback.claim(args, problem, "backtrack", settings)
        snapshot(0)
    began = time.perf_counter() - seconds
    progress = tqdm(range(done + 1, steps + 1), "backtrack", steps, initial=done,
                    disable=disback.rank() > 0)
    for step in disback.stoppable(progress):
        decay = (1 + math.cos(math.pi * (step - 1) / steps)) / 2 if config.decay == "cosine" else 1
        z, cond = problem.sample_inputs(batch)
        sigma, eps = problem.sample_sigma_vsd(batch), torch.randn_like(z)
        samples, mismatches = [], []
        for z_i, cond_i, sigma_i, eps_i in share(z, cond, sigma, eps):
            x0 = problem.generate(trained_student, z_i, cond_i)
            loss, mismatch = disback.vsd_loss(  # Eq. 8
                x0, sigma_i, fake, guided, cond_i, config.weighting, eps_i)
            (loss / args.accumulate).backward()
            samples.append((x0.detach(), cond_i))
            mismatches.append(mismatch)
        disback.update(optimizers["student"], config.lr_student * decay, problem.clip)
        if ema is not student:
            average(ema_weights, weights, None)

        for i in range(k):
            if i > 0:
                z, cond = problem.sample_inputs(batch)
                with torch.no_grad():
                    samples = [(problem.generate(student, *inputs), inputs[1])
                               for inputs in share(z, cond)]
            sigma, eps = problem.sample_sigma(batch), torch.randn_like(z)
            losses = []
            for (x0, cond_i), (sigma_i, eps_i) in zip(samples, share(sigma, eps)):
                loss = disback.score_matching_loss(  # Eq. 5
                    trained_fake, x0, sigma_i, cond_i, problem.score_weight(sigma_i), eps_i)
                (loss / args.accumulate).backward()
                losses.append(loss.detach())
            disback.update(optimizers["fake"], config.lr_fake * decay, problem.clip)

        numbers = torch.stack([sum(losses), sum(mismatches)]) * (1 / args.accumulate)
        numbers = disback.mean_over_ranks(numbers)
        totals, stop = totals + numbers, disback.stop_asked()
        save = step % config.save_every == 0 or step == steps
        if save or step % config.log_every == 0:
            mean_fake, mean_mismatch = (totals / (step - since)).tolist()
            totals, since = torch.zeros_like(totals), step
            spread = torch.cat([x0 for x0, _ in samples]).std(0, correction=0).mean()
            disback.log(log, step, walk.node, loss_fake=mean_fake, mismatch=mean_mismatch,
                        spread=disback.mean_over_ranks(spread).item(),
                        network_evals=evals_a_step * step, seconds=time.perf_counter() - began,
                        **problem.evaluate(shown))
            progress.set_postfix(node=walk.node, mismatch=f"{mean_mismatch:.3g}")
        if walk.step(numbers[1]) or save:
            snapshot(step)
        if save or stop:
            disback.save_state(state, step, nets, optimizers, settings=settings, node=walk.node,
                               age=walk.age, mismatch=walk.mismatch, totals=totals, since=since,
                               seconds=time.perf_counter() - began)
        if stop:
            sys.exit(f"stopped by {stop} after step {step}: --resume goes on from there")

    disback.save_tensors(args.out / "student.safetensors", ema.state_dict())
    stage1, stage2 = path.about.get("network_evals", 0) if path else 0, evals_a_step * steps
    disback.save_json(args.out / "metrics.json", {
        **problem.about, "method": "disback" if args.target == "path" else "vsd",
        "fake_init": fake_init, "node": walk.node, "steps": steps,
        "peak_memory_bytes": disback.peak_memory(), "seconds": time.perf_counter() - began,
        "network_evals": {"stage1": stage1, "stage2": stage2, "total": stage1 + stage2},
        **problem.evaluate(shown)})
    disback.barrier()
    problem.draw(args.out, path, args.compare)
    if walk.node > 0 and disback.rank() == 0:
        print(f"note: the target is still node {walk.node}; more --steps reach the teacher")


if __name__ == "__main__":
    disback.run(main)
