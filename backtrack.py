"""Stage 2, Distribution Backtracking (Algorithm 2): distil the student while the target walks back
along the recorded path, from the node before the last to the teacher."""

import copy
import dataclasses
import functools
import json
import math
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
    resume=dict(action="store_true", help="continue the run in OUT from its last checkpoint"),
    compare=dict(type=Path, metavar="DIR", help="a finished run to draw beside this one"))


def main(argv: list[str]) -> None:
    args, problem = disback.start("backtrack", __doc__, argv, **FLAGS)
    config, batch, steps = problem.config, problem.config.batch, problem.config.backtrack_steps
    fake_init = args.fake_init or ("degraded" if args.target == "path" else "teacher")
    path = None if (args.target, fake_init) == ("teacher", "teacher") else disback.Path(
        args.path or args.out / "path", problem.about, problem.unpack)
    if args.compare:
        disback.load_json(args.compare / "metrics.json", "--compare takes a finished run")

    # Only the target walks, the teacher in whose place the nodes are put; the fake learns.
    student, target = problem.student, problem.teacher
    fake = copy.deepcopy(problem.teacher)
    if fake_init == "degraded":
        path.load(len(path) - 1, fake)
    walk = disback.Walk(path if args.target == "path" else None, target, config.interval,
                        config.switch == "adaptive")
    guided = functools.partial(problem.guide, target)
    ema, average = copy.deepcopy(student), get_ema_multi_avg_fn(config.ema)
    weights, ema_weights = list(student.parameters()), list(ema.parameters())
    adam = functools.partial(torch.optim.AdamW, betas=(config.beta1, config.beta2),
                             weight_decay=config.weight_decay, fused=True)
    adam_student, adam_fake = adam(student.parameters()), adam(fake.parameters())
    parts = dict(student=student, fake=fake, ema=ema, adam_student=adam_student,
                 adam_fake=adam_fake)

    snapshot_inputs = problem.snapshot()
    settings = {**problem.about, **dataclasses.asdict(config), "target": args.target,
                "fake_init": fake_init, "path": path and disback.sha256(path.folder / "path.json")}

    # In forwards of the network, an update of the student costs 5: its own forward, the backward's
    # 2, fake and target; one of the fake 3. The first takes the student's sample, others draw one.
    k = config.fake_updates
    evals_a_step = batch * (4 + problem.guide_evals + 3 * k + (k - 1))

    def snapshot(step):
        with torch.no_grad():
            x0 = problem.generate(ema, *snapshot_inputs)
        disback.save_tensors(args.out / "snapshots" / f"{step:07d}.safetensors",
                             {"x0": x0, "node": torch.tensor(walk.node)})

    if not args.resume:
        disback.claim(args, problem, "backtrack", settings)
        snapshot(0)
    done, seconds = load_state(args.out, parts, walk, settings) if args.resume else (0, 0.0)
    began, totals, since = time.perf_counter() - seconds, 0.0, done
    for step in (progress := tqdm(range(done + 1, steps + 1), "backtrack", steps, initial=done)):
        decay = (1 + math.cos(math.pi * (step - 1) / steps)) / 2 if config.decay == "cosine" else 1
        z, cond = problem.sample_inputs(batch)
        x0 = problem.generate(student, z, cond)
        sigma = problem.sample_sigma_vsd(batch)
        loss, mismatch = disback.vsd_loss(x0, sigma, fake, guided, cond, config.weighting)  # Eq. 8
        disback.update(adam_student, loss, config.lr_student * decay, problem.clip)
        average(ema_weights, weights, None)

        for i in range(k):
            if i > 0:
                z, cond = problem.sample_inputs(batch)
                with torch.no_grad():
                    x0 = problem.generate(student, z, cond)
            sigma = problem.sample_sigma(batch)
            loss_fake = disback.score_matching_loss(
                fake, x0.detach(), sigma, cond, problem.score_weight(sigma))  # Eq. 5
            disback.update(adam_fake, loss_fake, config.lr_fake * decay, problem.clip)

        totals = totals + torch.stack([loss_fake.detach(), mismatch])
        save = step % config.save_every == 0 or step == steps
        if save or step % config.log_every == 0:
            mean_fake, mean_mismatch = (totals / (step - since)).tolist()
            totals, since = 0.0, step
            disback.log(args.out / "log.jsonl", step, walk.node, loss_fake=mean_fake,
                        mismatch=mean_mismatch, network_evals=evals_a_step * step,
                        seconds=time.perf_counter() - began, **problem.evaluate(ema))
            progress.set_postfix(node=walk.node, mismatch=f"{mean_mismatch:.3g}")
        if walk.step(mismatch) or save:
            snapshot(step)
        if save:
            save_state(args.out, parts, walk, settings, step, time.perf_counter() - began)

    disback.save_tensors(args.out / "student.safetensors", ema.state_dict())
    stage1, stage2 = path.about.get("network_evals", 0) if path else 0, evals_a_step * steps
    disback.save_json(args.out / "metrics.json", {
        **problem.about, "method": "disback" if args.target == "path" else "vsd",
        "fake_init": fake_init, "node": walk.node, "steps": steps,
        "peak_memory_bytes": disback.peak_memory(), "seconds": time.perf_counter() - began,
        "network_evals": {"stage1": stage1, "stage2": stage2, "total": stage1 + stage2},
        **problem.evaluate(ema)})
    problem.draw(args.out, path, args.compare)
    if walk.node > 0:
        print(f"note: the target is still node {walk.node}; more --steps reach the teacher")


def save_state(out: Path, parts: dict, walk: disback.Walk, settings, step, seconds) -> None:
    """Write all that a resumed run needs; what is not finite never replaces what was good."""
    state = {name: part.state_dict() for name, part in parts.items()}
    if not all(t.isfinite().all() for name in ("student", "fake") for t in state[name].values()):
        raise disback.Refusal(f"a weight is not finite at step {step}: try lower learning rates; "
                              f"{out / 'state.pt'} is kept as it was")
    state |= {"step": step, "seconds": seconds, "settings": settings,
              "walk": (walk.node, walk.age, walk.mismatch),
              "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
    disback.atomically(out / "state.pt", lambda file: torch.save(state, file))


def load_state(out: Path, parts: dict, walk: disback.Walk, settings: dict) -> tuple[int, float]:
    """Go back to the checkpoint, and log.jsonl with it; returns its step and the seconds spent."""
    file, log = out / "state.pt", out / "log.jsonl"
    with disback.blame(f"{file} is missing or not a checkpoint of this run: start again with "
                       "--overwrite"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        disback.must_agree(file, state["settings"], settings)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        walk.node, walk.age, walk.mismatch = state["walk"]
        torch.set_rng_state(state["random"][0])
        torch.cuda.set_rng_state_all(state["random"][1:])
    if walk.path:
        walk.path.load(walk.node, walk.target)
    lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]  # untorn
    kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
    disback.atomically(log, lambda file: file.write_text("".join(kept)))
    return state["step"], state["seconds"]


if __name__ == "__main__":
    disback.run(main)
