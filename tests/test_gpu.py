"""Does everything run on this machine's GPU, and does it say what a CPU says? What a GPU alone can
show is skipped where there is none:

    python -m pytest -v tests/test_gpu.py
"""

import argparse
import contextlib
import copy
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import BACKTRACK, ROOT, SMALL, make

import backtrack
import degrade
import disback
from runtime import place, ranks
from runtime.run import Run

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
FLAGS = {"toy2d": SMALL, "imagenet64": ["--teacher-steps", "20"], "sdxl": []}
QUICK = {"toy2d": {"teacher_steps": 60}, "imagenet64": {"teacher_steps": 2}, "sdxl": {}}
FP32, BF16 = 1e-4, 0.05  # the largest relative differences; bfloat16 has eight bits


@pytest.fixture
def quick(monkeypatch, small_digits, tmp_path):
    """Teachers that are soon trained, no classifier of digits, and one prompt."""
    from imagenet64 import problem
    from sdxl import text

    (tmp_path / "prompts.txt").write_text("a dog")
    monkeypatch.setattr(text, "SHIPPED", tmp_path / "prompts.txt")
    monkeypatch.setattr(problem, "Evaluation", lambda *_: None)


@pytest.fixture
def no_tf32():
    """Products of float32 in float32: TF32, which the stages allow, has ten bits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def losses(name, device, compiled=False, scale=1.0, **changes):
    """Of a problem's smallest preset, on the same inputs always, z times `scale`: the mismatch
    degree, the norm of the student's gradient, the score-matching loss and the norm of the fake's
    gradient; float64 [4], on the CPU. The fake is the teacher with weights a tenth larger."""
    module = importlib.import_module(f"{name}.problem")
    inputs = make(module, **QUICK[name])
    torch.manual_seed(0)
    drawn = inputs.sample_inputs(4), inputs.sample_sigma(4), inputs.sample_sigma_vsd(4)
    eps = torch.randn_like(drawn[0][0])
    (z, cond), sigma, sigma_vsd, eps = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(device), (*drawn, eps))
    made = make(module, device=device, **QUICK[name] | changes)
    student, target, fake = made.student, made.teacher, copy.deepcopy(made.teacher)
    with torch.no_grad():
        for weight in fake.parameters():
            weight *= 1.1
    for net in (student, target, fake):
        place.ready(net, argparse.Namespace(shard=False, compile=compiled), made.blocks)
    x0 = made.generate(student, scale * z, cond)
    loss, mismatch = disback.vsd_loss(
        x0, sigma_vsd, fake, lambda *x: made.guide(target, *x), cond, "x0", eps)
    loss.backward()
    score = disback.score_matching_loss(
        fake, x0.detach(), sigma, cond, made.score_weight(sigma), eps)
    score.backward()
    norms = [torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
             for net in (student, fake)]
    return torch.stack([mismatch, norms[0], score.detach(), norms[1]]).double().cpu()


def apart(found, expected):
    """The largest relative difference of any number."""
    return ((found - expected).abs() / expected.abs()).max().item()


@pytest.mark.parametrize("name", FLAGS)
def test_losses_in_bf16_are_those_in_fp32_and_do_not_vanish_and_see_an_input_that_changes(
        name, quick, no_tf32):
    device = ranks.device()
    found = losses(name, device)
    assert found.isfinite().all() and (found > 1e-3).all()
    assert apart(losses(name, device, scale=1.001), found) > 1e-5
    assert 0 < apart(losses(name, device, precision="bf16"), found) < BF16


@gpu
@pytest.mark.parametrize("name", FLAGS)
def test_losses_and_gradients_are_the_cpus_and_the_compiled_networks(name, quick, no_tf32):
    found = losses(name, "cuda")
    assert apart(found, losses(name, "cpu")) < FP32
    assert apart(losses(name, "cuda", compiled=True), found) < FP32


@gpu
@pytest.mark.parametrize("name", FLAGS)
def test_stages_run_in_bf16_stop_and_go_on_there_and_from_a_cpus_checkpoint(name, tmp_path):
    common = [name, "--precision", "bf16", "--steps", "10", "--log-every", "2", *FLAGS[name]]
    degrade.main([*common, "--out", str(tmp_path / "run"), "--nodes", "4"])
    walk = [*common, "--interval", "3", "--save-every", "4"]
    backtrack.main([*walk, "--out", str(tmp_path / "run")])
    for where, env in {"here": {}, "on a CPU": {"CUDA_VISIBLE_DEVICES": ""}}.items():
        out = tmp_path / where
        shutil.copytree(tmp_path / "run" / "path", out / "path")
        rest = [*walk, "--no-compile", "--out", str(out)]
        stop(out, [sys.executable, "backtrack.py", *rest], env)
        backtrack.main([*rest, "--resume"])


def stop(out, command, env):
    """Run a stage until its first checkpoint, and stop it as a cluster does."""
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stderr=subprocess.PIPE)
    while run.poll() is None and not (out / "state.pt").exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate()[1]
    assert (out / "state.pt").exists(), said


@contextlib.contextmanager
def no_waiting():
    """An operation for which the host waits for the GPU raises inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FLAGS)
def test_the_host_waits_for_nothing_inside_an_iteration(tmp_path, monkeypatch, name, precision):
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device="cuda").item()

    def watched(steps):
        for step in steps:
            # The first makes handles and workspaces; the last is saved and logged.
            with no_waiting() if 1 < step < 8 else contextlib.nullcontext():
                yield step

    steps = Run.steps
    monkeypatch.setattr(Run, "steps", lambda run, total: watched(steps(run, total)))
    monkeypatch.chdir(tmp_path)
    common = [name, *FLAGS[name], "--batch", "8", "--steps", "8", "--log-every", "99",
              "--precision", precision, "--no-compile", "--out"]
    degrade.main([*common, "path", "--nodes", "1", "--spacing", "linear"])
    backtrack.main([*common, "run", "--save-every", "99", "--target", "teacher"])


@gpu
def test_a_compiled_stage_waits_for_nothing_and_compiles_nothing_anew_at_a_switch(
        recorded, tmp_path, monkeypatch, no_figures):
    seen = []

    def watched(steps):
        for step in steps:
            yield step
            seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    steps = Run.steps
    monkeypatch.setattr(Run, "steps", lambda run, total: watched(steps(run, total)))
    shutil.copytree(recorded / "path", tmp_path / "path")
    backtrack.main(["toy2d", "--out", str(tmp_path), *BACKTRACK, "--compile"])
    assert seen[0] > 0 and seen[-1] == seen[0]
