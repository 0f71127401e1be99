"""Both stages end to end on a shrunken toy: what they write, count, repeat and resume."""

import contextlib
import copy
import dataclasses
import importlib
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, TINY, forwards, make, read, same
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import backtrack
import degrade
import disback
from toy2d import diagnosis, model, problem

NETS = model.Denoiser, model.Untrained


def backtracked(recorded, out, *flags):
    shutil.copytree(recorded / "path", out / "path")
    backtrack.main(["toy2d", "--out", str(out), *BACKTRACK, *flags])
    return load_file(out / "student.safetensors")


def test_both_stages_write_the_run_folder_with_complete_metrics(pair):
    """test_toy.py looks at the figures."""
    run = pair / "main"
    metrics = read(run / "metrics.json")
    assert metrics["problem"] == "toy2d" and metrics["preset"] == "ring" and metrics["seed"] == 0
    assert metrics["method"] == "disback" and metrics["steps"] == 20 and metrics["node"] == 0
    assert metrics["seconds"] > 0 and metrics["peak_memory_bytes"] > 10e6
    for name in ("swd", "energy_distance", "mode_tv", "off_mode"):
        assert metrics[name] >= 0
    vsd = read(pair / "vsd" / "metrics.json")
    assert vsd["method"] == "vsd" and vsd["network_evals"]["stage1"] == 0
    assert vsd["network_evals"]["stage2"] == metrics["network_evals"]["stage2"] == 8 * 64 * 20
    lines = read(run / "log.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]  # every fifth at first
    assert {"node", "loss_fake", "mismatch", "network_evals", "swd", "data_distance", "spread",
            "fake_bias", "teacher_error"} <= lines[0].keys()
    kept = {int(file.stem) for file in (run / "snapshots").iterdir()}
    assert kept >= {0, 5, 10, 15, 20}
    settings = read(run / "config.json")["backtrack"]
    assert settings["interval"] == 2 and settings["target"] == "path"


def test_the_path_starts_with_the_teacher_and_ends_elsewhere(recorded):
    teacher = make(problem, **TINY).teacher.state_dict()
    assert same(recorded / "path" / "00.safetensors", teacher)
    assert not same(recorded / "path" / "04.safetensors", teacher)
    about = read(recorded / "path" / "path.json")
    assert about["problem"] == "toy2d" and len(about["positions"]) == 5


def test_the_same_seed_gives_the_same_bits_however_often_it_logs_and_saves(
        recorded, completed, tmp_path, no_figures):
    often = backtracked(recorded, tmp_path / "often", "--log-every", "3", "--save-every", "5")
    assert same(often, completed)


@pytest.mark.parametrize("flags", [
    ["--interval", "3"], ["--switch", "adaptive", "--interval", "3", "--fake-updates", "2"]])
def test_a_run_that_is_cut_off_resumes_to_the_same_bits(recorded, tmp_path, no_figures, cut_off,
                                                        flags):
    whole = backtracked(recorded, tmp_path / "whole", *flags)
    shutil.copytree(recorded / "path", tmp_path / "cut" / "path")
    argv = ["toy2d", "--out", str(tmp_path / "cut"), *BACKTRACK, *flags]
    cut_off(13 * (3 if "--fake-updates" in flags else 2) - 1, backtrack.main, argv)
    backtrack.main([*argv, "--resume"])
    assert same(whole, tmp_path / "cut")
    steps = [line["step"] for line in read(tmp_path / "cut" / "log.jsonl")]
    assert steps == [5, 10, 15, 20]  # the lines after the checkpoint, of step 8, are not doubled


def test_a_short_run_takes_the_student_most_of_the_way_to_the_data(tmp_path, no_figures):
    backtrack.main(["toy2d", "--out", str(tmp_path), "--target", "teacher", *BACKTRACK,
                    "--steps", "120", "--lr-student", "0.02", "--lr-fake", "0.02",
                    "--ema", "0.9", "--save-every", "120"])
    lines = read(tmp_path / "log.jsonl")
    assert lines[-1]["swd"] < lines[0]["swd"] / 2


@pytest.fixture
def rates(before_updates):
    """(optimizer, learning rate) of every update."""
    seen = []
    before_updates(lambda optimizer: seen.append((optimizer, optimizer.param_groups[0]["lr"])))
    return seen


@pytest.fixture
def watched(recorded, tmp_path, no_figures, monkeypatch, rates):
    """watched(main, *flags): what is seen of a stage whose target is guided and whose noise levels
    are its own: the arguments of the losses (networks as they were then), the network that was
    guided each time, and (optimizer, learning rate) of the updates."""
    seen = SimpleNamespace(vsd_loss=[], score_matching_loss=[], guided=[], rates=rates,
                           out=tmp_path)
    made = problem.make

    def spy(name, loss):
        def watch(*args):
            getattr(seen, name).append(
                [copy.deepcopy(arg) if isinstance(arg, NETS) else arg for arg in args])
            return loss(*args)

        monkeypatch.setattr(disback, name, watch)

    def guide(net, x, sigma, cond):
        seen.guided.append(net)
        return net(x, sigma, cond)

    def run(main, *flags):
        monkeypatch.setattr(problem, "make", lambda *args: dataclasses.replace(
            made(*args), guide=guide, guide_evals=2,
            sample_sigma_vsd=lambda n: torch.full((n, 1), 3.0),
            sample_sigma=lambda n: torch.linspace(4, 5, n)[:, None]))
        for name in ("vsd_loss", "score_matching_loss"):
            spy(name, getattr(disback, name))
        if main is backtrack.main:
            shutil.copytree(recorded / "path", tmp_path / "path")
        main(["toy2d", "--out", str(tmp_path), *flags])
        return seen

    return run


def test_the_fake_starts_at_the_last_node_and_learns_at_its_levels_with_the_problems_weight(
        recorded, watched):
    seen = watched(backtrack.main, *BACKTRACK)
    fake = seen.vsd_loss[0][2]
    assert same(fake.state_dict(), recorded / "path" / "04.safetensors")
    assert len(seen.score_matching_loss) == 20
    for _, _, sigma, _, weight, _ in seen.score_matching_loss:
        assert sigma.min() == 4 and sigma.max() == 5
        # EDM's weight, (sigma^2 + sigma_data^2) / (their product)^2
        torch.testing.assert_close(weight, 1.42**-2 + sigma**-2)


def test_the_student_learns_by_the_weighting_the_momentum_and_the_levels_that_are_asked_for(
        watched):
    seen = watched(backtrack.main, *BACKTRACK, "--weighting", "dmd", "--beta1", "0.3",
                   "--beta2", "0.7", "--weight-decay", "0.1")
    assert {args[5] for args in seen.vsd_loss} == {"dmd"}
    assert {args[1].unique().item() for args in seen.vsd_loss} == {3.0}
    for optimizer, _ in seen.rates:
        assert optimizer.defaults["betas"] == (0.3, 0.7)
        assert optimizer.defaults["weight_decay"] == 0.1


def test_only_the_target_is_guided_and_its_forwards_are_counted(recorded, watched):
    seen = watched(backtrack.main, *BACKTRACK)
    assert len(seen.guided) == 20 and len({id(net) for net in seen.guided}) == 1
    teacher = recorded / "path" / "00.safetensors"  # the walk has brought the target there
    assert same(seen.guided[0].state_dict(), teacher)
    assert read(seen.out / "metrics.json")["network_evals"]["stage2"] == 9 * 64 * 20


def test_student_and_fake_learn_at_their_own_rates_which_fall_as_a_cosine(watched):
    """Both of the fake's updates in an iteration are at one rate."""
    seen = watched(backtrack.main, *BACKTRACK, "--lr-student", "3e-3", "--lr-fake", "7e-3",
                   "--fake-updates", "2")
    fall = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    for first, rate in ((0, 3e-3), (1, 7e-3), (2, 7e-3)):
        assert [lr for _, lr in seen.rates[first::3]] == pytest.approx([rate * f for f in fall])
    assert len({id(optimizer) for optimizer, _ in seen.rates}) == 2


def test_stage_1_learns_at_its_own_rate_with_the_problems_weight(watched):
    make(problem, **TINY)  # a teacher in the cache
    seen = watched(degrade.main, *DEGRADE, "--lr-degrade", "5e-3")
    assert [lr for _, lr in seen.rates][-20:] == [5e-3] * 20
    for _, _, sigma, _, weight, _ in seen.score_matching_loss[-20:]:
        torch.testing.assert_close(weight, 1.42**-2 + sigma**-2)


def test_the_student_that_is_saved_is_the_moving_average(
        recorded, completed, tmp_path, no_figures):
    def raw(out):
        return torch.load(out / "state.pt", weights_only=True)["student"]

    assert not same(completed, raw(completed))
    forgetful = backtracked(recorded, tmp_path / "fast", "--ema", "1e-9")
    for name, value in raw(tmp_path / "fast").items():
        torch.testing.assert_close(forgetful[name], value)
    assert same(backtracked(recorded, tmp_path / "none", "--ema", "0"), raw(tmp_path / "none"))


def test_network_evals_are_the_forwards_and_backwards_that_are_made(tmp_path, no_figures):
    """At most 4k + 4 an iteration, with k = 3 here and 1 above."""
    make(problem, **TINY)  # a teacher in the cache
    argv = ["toy2d", "--out", tmp_path]
    stage1 = forwards(NETS, [64], degrade.main, [*argv, *DEGRADE])
    stage2 = forwards(NETS, [64], backtrack.main, [*argv, *BACKTRACK, "--fake-updates", 3])
    assert stage2 == 16 * 64 * 20
    assert read(tmp_path / "metrics.json")["network_evals"] == {
        "stage1": stage1, "stage2": stage2, "total": stage1 + stage2}


def test_the_two_by_two_of_target_and_fake_start_are_four_different_runs(
        recorded, completed, pair, tmp_path, no_figures):
    students = [load_file(run / "student.safetensors") for run in (completed, pair / "vsd")]
    for target, fake in (("path", "teacher"), ("teacher", "degraded")):
        students.append(backtracked(recorded, tmp_path / target, "--target", target,
                                    "--fake-init", fake))
        assert not any(same(students[-1], other) for other in students[:-1])
    assert not same(*students[:2])


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


# ------------------------------------------------------------------- the toy's networks and noise


def test_bf16_is_of_the_arithmetic_alone():
    full, half = (make(problem, precision=name, **TINY) for name in ("fp32", "bf16"))
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


def test_a_students_start_is_off_the_data_or_the_teachers_copy():
    with torch.no_grad():
        x0 = make(problem, distance=10.0, **TINY).student(torch.randn(1000, 2))
    assert x0.mean(0).norm().item() == pytest.approx(10.0, abs=0.5)
    copied = make(problem, start="teacher", start_sigma=2.0, **TINY)
    z = torch.randn(5, 2)
    expected = copied.teacher(2 * z, torch.full((5, 1), 2.0))
    torch.testing.assert_close(copied.student(z), expected)
    ours, theirs = copied.student.denoiser.net[0], copied.teacher.net[0]
    assert ours.weight.data_ptr() != theirs.weight.data_ptr()


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
    assert pytest.approx(  # the median, and a deviation to either side
        [2.84 * math.exp(-1.2 + shift) for shift in (-1.2, 0, 1.2)], rel=0.02) == diagnosis.LEVELS


def test_student_and_fake_draw_the_noise_that_is_asked_for():
    made = make(problem, noise="karras", sigma_min=3.0, sigma_max=4.0, **TINY)
    usual = make(problem, **TINY)
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
