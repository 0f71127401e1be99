"""Both stages end to end on a shrunken toy: what they write, count, repeat and resume."""

import contextlib
import copy
import dataclasses
import importlib
import json
import math
import shutil

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, make
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import backtrack
import degrade
import disback
from toy2d import model, problem

NETS = model.Denoiser, model.Untrained


def backtracked(recorded, out, *flags):
    shutil.copytree(recorded / "path", out / "path")
    backtrack.main(["toy2d", "--out", str(out), *BACKTRACK, *flags])
    return load_file(out / "student.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_both_stages_write_the_run_folder_with_complete_metrics(pair):
    """test_toy.py looks at the figures."""
    run = pair / "main"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["problem"] == "toy2d" and metrics["preset"] == "ring" and metrics["seed"] == 0
    assert metrics["method"] == "disback" and metrics["steps"] == 20 and metrics["node"] == 0
    assert metrics["seconds"] > 0 and metrics["peak_memory_bytes"] > 10e6
    for name in ("swd", "energy_distance", "mode_tv", "off_mode"):
        assert metrics[name] >= 0
    evals = metrics["network_evals"]
    assert evals["total"] == evals["stage1"] + evals["stage2"]
    vsd = json.loads((pair / "vsd" / "metrics.json").read_text())
    assert vsd["method"] == "vsd" and vsd["network_evals"]["stage1"] == 0
    assert vsd["network_evals"]["stage2"] == evals["stage2"] == 8 * 64 * 20
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]  # every fifth at first
    assert {"node", "loss_fake", "mismatch", "network_evals", "swd"} <= lines[0].keys()
    settings = json.loads((run / "config.json").read_text())["backtrack"]
    assert settings["interval"] == 2 and settings["target"] == "path"


def test_the_target_ends_as_the_recorded_teacher_and_the_path_starts_with_it(recorded):
    teacher = make(problem, "ring", width=16, depth=1, teacher_steps=60, teacher_batch=64).teacher
    assert same(load_file(recorded / "path" / "00.safetensors"), teacher.state_dict())
    last = load_file(recorded / "path" / "04.safetensors")
    assert not same(last, teacher.state_dict())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
        recorded, completed, tmp_path, no_figures):
    one = load_file(completed / "student.safetensors")
    assert same(one, backtracked(recorded, tmp_path / "two"))
    vsd = ["toy2d", *BACKTRACK, "--target", "teacher"]
    backtrack.main([*vsd, "--out", str(tmp_path / "zero"), "--seed", "0"])
    backtrack.main([*vsd, "--out", str(tmp_path / "three"), "--seed", "3"])
    assert not same(load_file(tmp_path / "zero" / "student.safetensors"),
                    load_file(tmp_path / "three" / "student.safetensors"))


def test_logging_and_saving_more_often_change_no_bit(recorded, completed, tmp_path, no_figures):
    often = backtracked(recorded, tmp_path / "often", "--log-every", "3", "--save-every", "5")
    assert same(often, load_file(completed / "student.safetensors"))


@pytest.mark.parametrize("flags", [
    ["--interval", "3"], ["--switch", "adaptive", "--interval", "3"], ["--fake-updates", "2"]])
def test_a_run_that_is_cut_off_resumes_to_the_same_bits(recorded, tmp_path, no_figures, cut_off,
                                                        flags):
    whole = backtracked(recorded, tmp_path / "whole", *flags)
    shutil.copytree(recorded / "path", tmp_path / "cut" / "path")
    cut_off(13 * (3 if "--fake-updates" in flags else 2) - 1, backtrack.main,
            ["toy2d", "--out", tmp_path / "cut", *BACKTRACK, *flags])
    backtrack.main(["toy2d", "--out", str(tmp_path / "cut"), *BACKTRACK, *flags, "--resume"])
    assert same(whole, load_file(tmp_path / "cut" / "student.safetensors"))
    lines = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [5, 10, 15, 20]  # the lines after the checkpoint, of step 8, are not doubled


def test_a_resumed_scheduler_has_its_node_its_age_and_its_sum_of_mismatches(
        recorded, tmp_path, no_figures, monkeypatch):
    flags = ["--switch", "adaptive", "--interval", "3"]  # 20 iterations end inside an interval
    backtracked(recorded, tmp_path, *flags)
    made, scheduler = [], disback.PathScheduler

    def remember(*args):
        made.append(scheduler(*args))
        return made[-1]

    monkeypatch.setattr(disback, "PathScheduler", remember)
    backtrack.main(["toy2d", "--out", str(tmp_path), *BACKTRACK, *flags, "--resume"])
    state = torch.load(tmp_path / "state.pt", weights_only=True)["others"]["scheduler"]
    assert state["node"] > 0 and state["age"] % 3 == 2 and state["mismatch"] > 0
    assert made[0].state_dict() == state
    node = load_file(recorded / "path" / f"{state['node']:02d}.safetensors")
    assert same(made[0].target.state_dict(), node)


def test_a_torn_last_line_of_the_log_does_not_stop_a_resumed_run(completed, finished):
    out, argv = finished
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 2')
    backtrack.main([*argv, "--resume"])
    assert same(*(load_file(run / "student.safetensors") for run in (completed, out)))
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 20


def test_a_short_run_takes_the_student_most_of_the_way_to_the_data(tmp_path, no_figures):
    backtrack.main(["toy2d", "--out", str(tmp_path), "--target", "teacher", *BACKTRACK,
                    "--steps", "120", "--lr-student", "0.02", "--lr-fake", "0.02",
                    "--ema", "0.9"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["swd"] < lines[0]["swd"] / 2


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the two losses; networks as they were then."""
    seen = {"vsd_loss": [], "score_matching_loss": []}

    def watch(name, loss):
        def spy(*args, **keywords):
            seen[name].append([copy.deepcopy(x) if isinstance(x, NETS) else x for x in args])
            return loss(*args, **keywords)

        monkeypatch.setattr(disback, name, spy)

    for name in seen:
        watch(name, getattr(disback, name))
    return seen


def test_the_fake_starts_at_the_last_node_and_learns_with_the_problems_weight(
        recorded, tmp_path, no_figures, calls):
    backtracked(recorded, tmp_path)
    _, _, fake, *_ = calls["vsd_loss"][0]
    assert same(fake.state_dict(), load_file(recorded / "path" / "04.safetensors"))
    assert len(calls["score_matching_loss"]) == 20
    for _, _, sigma, _, weight, _ in calls["score_matching_loss"]:
        # EDM's weight, (sigma^2 + sigma_data^2) / (their product)^2
        torch.testing.assert_close(weight, 1.42**-2 + sigma**-2)


def test_the_student_that_is_saved_is_the_moving_average(
        recorded, completed, tmp_path, no_figures):
    def raw(out):
        return torch.load(out / "state.pt", weights_only=True)["student"]

    assert not same(load_file(completed / "student.safetensors"), raw(completed))
    forgetful = backtracked(recorded, tmp_path / "fast", "--ema", "1e-9")
    for name, value in raw(tmp_path / "fast").items():
        torch.testing.assert_close(forgetful[name], value)
    assert same(backtracked(recorded, tmp_path / "none", "--ema", "0"), raw(tmp_path / "none"))


def test_bf16_is_of_the_arithmetic_alone():
    small = dict(width=16, depth=1, teacher_steps=60, teacher_batch=64)
    full, half = (make(problem, "ring", precision=name, **small) for name in ("fp32", "bf16"))
    assert same(full.teacher.state_dict(), half.teacher.state_dict())
    x, sigma = torch.randn(64, 2), torch.ones(64, 1)
    for one, other, inputs in ((full.teacher, half.teacher, (x, sigma)),
                               (full.student, half.student, (x,))):
        expected, found = one(*inputs), other(*inputs)
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)


def test_the_denoiser_is_the_raw_network_under_edms_preconditioning():
    torch.manual_seed(0)
    net, x, sigma = model.Denoiser(16, 1, 0.5), torch.randn(4, 2), torch.tensor(
        [[0.1], [0.5], [2.0], [20.0]])
    phase = sigma.log() / 4 * torch.tensor([1.0, 2.0, 4.0, 8.0])
    scaled = x / (sigma**2 + 0.25).sqrt()
    raw = net.net(torch.cat([scaled, phase.sin(), phase.cos()], dim=1))
    expected = 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * raw
    torch.testing.assert_close(net(x, sigma), expected)


@pytest.mark.parametrize("fake_updates", [1, 3])
def test_network_evals_are_the_forwards_and_backwards_that_are_made(
        recorded, tmp_path, no_figures, forwards, fake_updates):
    """At most 4k + 4 an iteration."""
    made = forwards(NETS, [64], lambda flags: backtracked(recorded, tmp_path, *flags),
                    ["--fake-updates", fake_updates])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["network_evals"]["stage2"] == made == (4 * fake_updates + 4) * 64 * 20


def test_network_evals_of_stage_1_are_those_that_are_made(tmp_path, forwards):
    made = forwards(NETS, [64], degrade.main, ["toy2d", "--out", tmp_path, *DEGRADE])
    assert json.loads((tmp_path / "path" / "path.json").read_text())["network_evals"] == made


def test_the_two_by_two_of_target_and_fake_start_are_four_different_runs(
        recorded, tmp_path, no_figures):
    students = [backtracked(recorded, tmp_path / f"{target}-{fake}", "--target", target,
                            "--fake-init", fake)
                for target in ("path", "teacher") for fake in ("degraded", "teacher")]
    for i, one in enumerate(students):
        assert not any(same(one, other) for other in students[:i])


def test_a_students_start_is_off_the_data_or_the_teachers_copy():
    small = dict(width=16, depth=1, teacher_steps=60, teacher_batch=64)
    off = make(problem, "ring", distance=10.0, **small)
    with torch.no_grad():
        x0 = off.student(torch.randn(1000, 2))
    assert x0.mean(0).norm().item() == pytest.approx(10.0, abs=0.5)
    copy = make(problem, "ring", start="teacher", start_sigma=2.0, **small)
    z = torch.randn(5, 2)
    expected = copy.teacher(2 * z, torch.full((5, 1), 2.0))
    torch.testing.assert_close(copy.student(z), expected)
    assert copy.student.denoiser.net[0].weight.data_ptr() != copy.teacher.net[0].weight.data_ptr()


@pytest.mark.parametrize("sigma, low", [(20.0, False), (0.02, True)])
def test_the_teachers_preconditioning_has_the_right_limits(sigma, low):
    """D is x where there is no noise, and does not depend on x's scale where there is much."""
    net = model.Denoiser(16, 1, 1.0)
    x = torch.randn(8, 2)
    change = (net(x, torch.full((8, 1), sigma)) - x).abs().max().item()
    assert (change < 0.1) if low else (change > 0.3)


def test_karras_levels_are_uniform_in_the_seventh_root_and_stay_in_range():
    torch.manual_seed(0)
    config = problem.Config()
    sigma = problem.karras_sigma(100_000, config)
    assert sigma.min() >= 0.02 * 0.9999 and sigma.max() <= 20.0 * 1.0001
    roots = (sigma ** (1 / 7) - 0.02 ** (1 / 7)) / (20.0 ** (1 / 7) - 0.02 ** (1 / 7))
    quantiles = torch.quantile(roots, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.01, rtol=0)


def test_lognormal_levels_are_edms_scaled_to_the_datas_deviation():
    """EDM: ln sigma ~ N(-1.2, 1.2^2) for data of standard deviation 0.5."""
    torch.manual_seed(0)
    logs = (problem.lognormal_sigma(100_000, 1.42) * 0.5 / 1.42).log()
    assert logs.shape == (100_000, 1)
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert logs.std().item() == pytest.approx(1.2, rel=0.01)


def test_student_and_fake_draw_the_noise_that_is_asked_for():
    small = dict(width=16, depth=1, teacher_steps=60, teacher_batch=64)
    made = make(problem, noise="karras", sigma_min=3.0, sigma_max=4.0, **small)
    usual = make(problem, **small)
    for draw in (made.sample_sigma, made.sample_sigma_vsd):
        assert 3 * 0.9999 <= draw(1000).min() < 3.1 < 3.9 < draw(1000).max() <= 4 * 1.0001
    for draw in (usual.sample_sigma, usual.sample_sigma_vsd):
        assert draw(1000).log().mean().item() == pytest.approx(-1.2 + math.log(2.84), abs=0.2)
    assert same(made.teacher.state_dict(), usual.teacher.state_dict())


def test_an_untrained_student_is_a_blob_with_the_fourier_features_of_its_input():
    torch.manual_seed(0)
    for dims in (2, 16):
        student, z = model.Untrained(8.0, 16, 1, dims), torch.randn(50, dims)
        assert student.centre.norm().item() == pytest.approx(8.0)
        features = torch.cat([z, *(wave(f * z) for wave in (torch.sin, torch.cos)
                                   for f in (1, 2, 4))], dim=1)
        torch.testing.assert_close(student(z), student.centre + z / 2 + student.net(features))
    assert student.centre[:2].norm() == 0  # in 16 dimensions it starts off the data's plane


def test_the_sampler_draws_a_gaussian_from_its_exact_denoiser(gaussian):
    torch.manual_seed(0)
    net = gaussian(1.0, 0.5).float()
    with torch.no_grad():
        x = problem.sample(net, 20_000, problem.Config())
    assert x.mean().item() == pytest.approx(1.0, abs=0.05)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.fixture
def rates(before_updates):
    """(optimizer, learning rate) of every update."""
    seen = []
    before_updates(lambda optimizer: seen.append((optimizer, optimizer.param_groups[0]["lr"])))
    return seen


@pytest.mark.parametrize("decay, fall", [
    ("cosine", [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]),
    ("constant", [1] * 20)])
def test_student_and_fake_learn_at_their_own_rates_which_fall_as_a_cosine_or_stay(
        recorded, tmp_path, no_figures, rates, decay, fall):
    backtracked(recorded, tmp_path, "--lr-student", "3e-3", "--lr-fake", "7e-3", "--decay", decay)
    assert [lr for _, lr in rates[0::2]] == pytest.approx([3e-3 * f for f in fall])
    assert [lr for _, lr in rates[1::2]] == pytest.approx([7e-3 * f for f in fall])
    assert len({id(optimizer) for optimizer, _ in rates}) == 2


def test_stage_1_learns_at_its_own_rate_with_the_problems_weight(tmp_path, calls, rates):
    degrade.main(["toy2d", "--out", str(tmp_path), *DEGRADE, "--lr-degrade", "5e-3"])
    assert [lr for _, lr in rates][-20:] == [5e-3] * 20
    for _, _, sigma, _, weight, _ in calls["score_matching_loss"][-20:]:  # the teacher's come first
        torch.testing.assert_close(weight, 1.42**-2 + sigma**-2)


def test_the_weighting_and_the_momentum_are_those_asked_for(
        recorded, tmp_path, no_figures, calls, rates):
    backtracked(recorded, tmp_path, "--weighting", "dmd", "--beta1", "0.3", "--beta2", "0.7",
                "--weight-decay", "0.1")
    assert {args[5] for args in calls["vsd_loss"]} == {"dmd"}
    for optimizer, _ in rates:
        assert optimizer.defaults["betas"] == (0.3, 0.7)
        assert optimizer.defaults["weight_decay"] == 0.1


def test_only_the_target_is_guided_and_its_forwards_are_counted(
        recorded, tmp_path, no_figures, monkeypatch):
    make, guided = problem.make, []

    def guide(net, x, sigma, cond):
        guided.append(net)
        return net(x, sigma, cond)

    monkeypatch.setattr(problem, "make", lambda *args, **changes: dataclasses.replace(
        make(*args, **changes), guide=guide, guide_evals=2))
    backtracked(recorded, tmp_path)
    assert len(guided) == 20 and len({id(net) for net in guided}) == 1
    for name, weight in guided[0].state_dict().items():  # the walk has brought it to node 0
        assert torch.equal(weight, load_file(recorded / "path" / "00.safetensors")[name])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["network_evals"]["stage2"] == 9 * 64 * 20


class NotOnTheCPU(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert not isinstance(made, torch.Tensor) or made.device.type == "meta", function
        return made


@pytest.mark.parametrize("name", ["toy2d", "imagenet64", "sdxl"])
def test_the_loops_make_all_tensors_where_the_networks_are(name, monkeypatch):
    """A host waits while it copies from the CPU."""
    # On the meta device autocast is refused, also where it is not enabled.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    preset = next(iter(importlib.import_module(f"{name}.problem").PRESETS.values()))
    bench = importlib.import_module(f"{name}.bench").BENCH
    made = bench.make(preset, 0, torch.device("meta"))
    with NotOnTheCPU():
        z, cond = made.sample_inputs(4)
        x0 = made.generate(made.student, z, cond)
        for sigma in (made.sample_sigma(4), made.sample_sigma_vsd(4)):
            made.guide(made.teacher, x0 + sigma * torch.randn_like(z), sigma, cond)
            made.score_weight(sigma)


def test_the_students_update_and_score_matching_have_their_own_noise_levels(
        recorded, tmp_path, no_figures, monkeypatch, calls):
    make = problem.make
    monkeypatch.setattr(problem, "make", lambda *args, **changes: dataclasses.replace(
        make(*args, **changes), sample_sigma_vsd=lambda n: torch.full((n, 1), 3.0),
        sample_sigma=lambda n: torch.full((n, 1), 4.0)))
    backtracked(recorded, tmp_path)
    assert {args[1].unique().item() for args in calls["vsd_loss"]} == {3.0}
    assert {args[2].unique().item() for args in calls["score_matching_loss"]} == {4.0}
