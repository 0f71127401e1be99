"""imagenet64 end to end on digits: the problem, both stages, sampling, and what they refuse."""

import dataclasses
import functools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make, read, refusal, same
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from scipy.stats import kstest

import backtrack
import degrade
import disback
from imagenet64 import digits, edm, features, problem, sample
from runtime import files

pytestmark = pytest.mark.usefixtures("small_digits")
SMALL = ["--teacher-steps", "2", "--batch", "8", "--log-every", "4"]
DEGRADE = ["imagenet64", *SMALL, "--steps", "4", "--nodes", "2"]
BACKTRACK = ["imagenet64", *SMALL, "--steps", "4", "--interval", "2", "--save-every", "3"]


@pytest.fixture(scope="module")
def run(small_digits, tmp_path_factory):
    """A finished run of both stages, its figures of fewer steps; copy it before writing to it."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edm, "heun", functools.partial(edm.heun, steps=3))
        patch.setattr(problem.Evaluation, "of_halves", lambda self: 1.0)
        degrade.main([*DEGRADE, "--out", str(out)])
        backtrack.main([*BACKTRACK, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def tiny(small_digits):
    return make(problem, "tiny", teacher_steps=2)


@pytest.fixture
def net(monkeypatch):
    """A network for the digits; also the one that stands for every teacher."""
    torch.manual_seed(5)
    net = edm.Denoiser(**problem.NETWORKS["digits"])
    monkeypatch.setattr(problem, "load_teacher", lambda config: (net, "sha"))
    return net


def sampled(capsys, *argv):
    """The arrays of an .npz that the command wrote."""
    sample.main([*map(str, argv)])
    with np.load(capsys.readouterr().out.strip(), allow_pickle=False) as data:
        return data["arr_0"], data["arr_1"]


def must_show(images, x0):
    """Sampled images are those in x0; a rounding may fall on either side."""
    expected = features.to_uint8(x0)[:, 0].numpy().astype(int)
    assert np.abs(expected - images[..., 0]).max() <= 1


# ------------------------------------------------------------------------------- the problem


def test_the_student_starts_as_a_copy_of_the_teacher_that_denoises_pure_noise_once(tiny):
    z, cond = tiny.sample_inputs(3)
    expected = tiny.teacher(80 * z, torch.full((3, 1, 1, 1), 80.0), cond)
    torch.testing.assert_close(tiny.generate(tiny.student, z, cond), expected)
    theirs = {p.data_ptr() for p in tiny.teacher.parameters()}
    assert not any(p.data_ptr() in theirs for p in tiny.student.parameters())


def test_an_untrained_student_depends_on_the_seed_and_the_teacher_does_not():
    one, other = (make(problem, "tiny", seed, start="untrained", teacher_steps=2)
                  for seed in (0, 1))
    name = "model.enc.8x8_conv.weight"
    assert not torch.equal(one.student.state_dict()[name], other.student.state_dict()[name])
    assert torch.equal(one.teacher.state_dict()[name], other.teacher.state_dict()[name])


def test_labels_are_one_hot_and_uniform_and_latents_are_normal(tiny):
    torch.manual_seed(0)
    z, cond = tiny.sample_inputs(5000)
    assert (cond.sum(dim=1) == 1).all() and set(cond.unique().tolist()) == {0.0, 1.0}
    assert (cond.mean(dim=0) - 0.1).abs().max() < 4 * (0.09 / 5000) ** 0.5
    assert z.shape == (5000, 1, 8, 8) and kstest(z[:, 0, 3, 5].numpy(), "norm").pvalue > 1e-3


def test_a_seed_draws_the_latents_and_then_the_labels(tiny):
    """Another order would be another run of the same seed."""
    torch.manual_seed(3)
    z, cond = tiny.sample_inputs(50)
    torch.manual_seed(3)
    assert torch.equal(z, torch.randn(50, 1, 8, 8))
    assert torch.equal(cond.argmax(dim=1), torch.randint(10, (50,)))


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.02, 0.98)])
def test_karras_levels_are_uniform_in_the_seventh_root_between_their_ends(low, high):
    torch.manual_seed(0)
    sigma = problem.sample_sigma("karras", 20_000, low, high)
    grid = edm.karras_grid(1001)[:-1].flip(0)  # index 0 … 1000, sigma from 0.002 to 80
    least, most = grid[round(low * 1000)].item(), grid[round(high * 1000)].item()
    assert sigma.min() >= least * 0.999 and sigma.max() <= most * 1.001
    roots = (sigma.flatten() ** (1 / 7) - least ** (1 / 7)) / (most ** (1 / 7) - least ** (1 / 7))
    assert kstest(roots.numpy(), "uniform").pvalue > 1e-3


def test_lognormal_levels_have_edms_mean_and_deviation(tiny):
    torch.manual_seed(0)
    sigma = tiny.sample_sigma(20_000)
    assert sigma.shape == (20_000, 1, 1, 1)
    assert kstest(sigma.flatten().log().numpy(), "norm", args=(-1.2, 1.2)).pvalue > 1e-3


PRESETS = {  # as the README tabulates them
    "full": dict(images="imagenet", batch=280, lr_student=2e-6, lr_fake=2e-6, lr_degrade=2e-6,
                 beta1=0.9, beta2=0.999, weight_decay=0.01, fake_updates=5, weighting="dmd",
                 sigma_vsd="karras", sigma_fake="karras", ema=0.0, start_sigma=80.0,
                 precision="bf16", nodes=10, interval=500, degrade_steps=1000),
    "diff-instruct": dict(images="imagenet", batch=128, lr_student=1e-5, lr_fake=1e-5,
                          lr_degrade=1e-5, beta1=0.0, beta2=0.999, weight_decay=0.0,
                          fake_updates=1, weighting="x0", sigma_vsd="lognormal",
                          sigma_fake="lognormal", ema=0.9998, start_sigma=1.0, precision="bf16",
                          nodes=10, interval=500, degrade_steps=1000)}


@pytest.mark.parametrize("preset, values", PRESETS.items())
def test_presets_are_the_published_settings(preset, values):
    found = dataclasses.asdict(problem.PRESETS[preset])
    assert {name: found[name] for name in values} == values
    if values["ema"]:  # half a million images of half-life
        half_life = math.log(0.5) / math.log(values["ema"]) * values["batch"]
        assert half_life == pytest.approx(5e5, rel=0.15)


def test_the_full_presets_figures_show_ten_classes_and_its_student_spares_the_grids_ends(
        monkeypatch):
    small = problem.NETWORKS["imagenet"] | dict(
        img_resolution=8, model_channels=32, channel_mult=(1,), num_blocks=1)
    monkeypatch.setitem(problem.NETWORKS, "imagenet", small)
    monkeypatch.setattr(problem, "load_teacher", lambda config: (edm.Denoiser(**small), "sha"))
    full = make(problem, "full")
    assert full.snapshot()[1].argmax(dim=1)[:10].tolist() == [*range(0, 1000, 100)]
    sigma = full.sample_sigma_vsd(20_000)
    grid = edm.karras_grid(1000)[:-1].flip(0)
    assert grid[19] < sigma.min() and sigma.max() < grid[981]
    assert full.sample_sigma(20_000).max() > grid[990]
    assert full.teacher.bf16 and full.evaluate(full.student) == {}


@torch.no_grad()
def test_evaluation_generates_at_the_students_own_noise_level():
    config, asked = dataclasses.replace(problem.TINY, start_sigma=3.0), set()
    evaluate = problem.Evaluation(config, "cpu")
    evaluate(lambda x, sigma, cond: asked.add((sigma.item(), round(x.std().item()))) or x)
    assert asked == {(3.0, 3)}


def test_evaluating_the_data_gives_no_distance_and_high_accuracy_and_leaves_the_random_state():
    before = torch.get_rng_state()
    evaluate, images = problem.Evaluation(problem.TINY, "cpu"), digits.load()[0]
    batches = iter(images.split(256))
    found = evaluate(lambda x, sigma, cond: next(batches))
    assert found["frechet"] == pytest.approx(0.0, abs=1e-6)
    assert found["accuracy"] > 0.99
    assert torch.equal(before, torch.get_rng_state())


def test_halves_of_the_digits_are_as_far_apart_as_numpy_says():
    evaluate = problem.Evaluation(problem.TINY, "cpu")
    images = edm.to_uint8(digits.load()[0])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = [evaluate.extract(images[part]).double().numpy() for part in order.tensor_split(2)]
    a, b = (np.cov(part.T) for part in parts)
    values = np.linalg.eigvals(a @ b).real.clip(min=0)
    expected = ((parts[0].mean(0) - parts[1].mean(0)) ** 2).sum() + np.trace(a + b) - 2 * (
        values**0.5).sum()
    assert evaluate.of_halves(splits=1) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------ the two stages


def test_both_stages_write_the_run_folder_with_figures_and_complete_metrics(run):
    metrics = read(run / "metrics.json")
    assert {"problem", "preset", "seed", "method", "steps", "seconds", "network_evals", "frechet",
            "accuracy", "peak_memory_bytes"} <= metrics.keys()
    assert metrics["node"] == 0 and metrics["method"] == "disback"
    for figure in ("path.png", "convergence.png"):
        assert imread(run / "figures" / figure).std() > 0


def test_snapshots_are_of_the_same_noise_and_labels_in_every_run(run, tiny):
    z, cond = tiny.snapshot()
    with torch.no_grad():
        expected = tiny.generate(tiny.student, z, cond)
    first = load_file(run / "snapshots" / "0000000.safetensors")["x0"]
    torch.testing.assert_close(first, expected)
    assert cond.argmax(dim=1).tolist() == [*range(10)] * 4


# ------------------------------------------------------------------------------------ sampling


def test_an_image_depends_on_its_seed_alone(run, tmp_path, capsys):
    file = tmp_path / "x.npz"
    whole, classes = sampled(capsys, run, "--images", 7, "--batch", 7, "--to", file)
    parts, same = sampled(capsys, run, "--images", 4, "--seed", 3, "--batch", 3, "--to", file)
    assert np.abs(whole[3:].astype(int) - parts).max() <= 1 and (classes[3:] == same).all()
    assert whole.shape == (7, 8, 8, 1) and whole.dtype == np.uint8
    assert len(np.unique(whole, axis=0)) == 7


def test_the_images_of_a_student_of_before_its_run_was_prolonged_are_told_to_be_so(
        run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "run")
    sample.main([str(out), "--images", "1"])
    assert "note:" not in capsys.readouterr().err
    config = read(out / "config.json")
    config["backtrack"]["backtrack_steps"] = 9
    files.save_json(out / "config.json", config)
    sample.main([str(out), "--images", "1"])
    assert "is of iteration 4, the run goes on to 9" in capsys.readouterr().err


def test_a_runs_images_are_its_students_in_one_step_of_classes_in_turn(
        run, net, tmp_path, capsys):
    """The classes start with the first image, whatever the batch."""
    flags = ["--classes", 1, 2, 3, "--to", tmp_path / "x.npz"]
    found, classes = sampled(capsys, run, "--images", 5, "--batch", 2, *flags)
    assert classes.tolist() == [1, 2, 3, 1, 2]
    assert sampled(capsys, run, "--images", 2, "--seed", 4, *flags)[1].tolist() == [1, 2]
    files.load_net(run / "student.safetensors", net)
    z = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed))
                     for seed in range(5)])
    with torch.no_grad():
        must_show(found, net(80 * z, torch.tensor(80.0), torch.eye(10)[classes]))


def test_images_of_a_teacher_or_a_node_are_drawn_by_heuns_method(run, net, tmp_path, capsys):
    flags, seen = ["--images", 3, "--steps", 4, "--to", tmp_path / "x.npz"], []
    z, classes = sample.inputs(range(3), None, problem.TINY)
    for node in (None, 0, 2):
        source = ["teacher"] if node is None else [run, "--node", node]
        seen.append(sampled(capsys, *source, *flags)[0])
        if node is not None:
            files.load_net(run / "path" / f"{node:02d}.safetensors", net)
        must_show(seen[-1], edm.heun(net, z, problem.labels(classes, problem.TINY), 4))
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


def test_what_is_made_of_a_teacher_lies_beside_the_runs_under_its_presets_name(
        net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.main(["teacher", "--images", "2", "--steps", "1"])
    assert (tmp_path / "runs" / "samples-teacher-tiny-1-steps.png").is_file()
    args = SimpleNamespace(source="teacher", preset=None, node=None)
    names = [str(sample.default_name(SimpleNamespace(**vars(args) | more), "fid")) for more in (
        {"steps": None}, {"steps": 18}, {"steps": 2}, {"steps": 2, "source": "a", "node": 1})]
    assert names == ["runs/fid-teacher-tiny", "runs/fid-teacher-tiny",
                     "runs/fid-teacher-tiny-2-steps", "a/fid-node-01-2-steps"]


def test_a_student_whose_images_are_not_finite_draws_none_and_measures_nan(run, net, tmp_path):
    """Its weights are finite; so the log's line says at which step it was."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    with torch.no_grad():
        net.model.out_conv.weight.fill_(3e38)
    files.save_tensors(tmp_path / "student.safetensors", net.state_dict())
    assert "images are not finite" in refusal(
        sample.main, [str(tmp_path), "--to", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()
    assert all(map(math.isnan, problem.Evaluation(problem.TINY, "cpu")(net).values()))


def test_the_grid_shows_every_image_in_its_place(run, tmp_path, capsys):
    images = sampled(capsys, run, "--images", 12, "--to", tmp_path / "x.npz")[0]
    sample.main([str(run), "--images", "12", "--to", str(tmp_path / "x.png")])
    grid = (imread(tmp_path / "x.png")[..., 0] * 255).round()
    assert grid.shape == (2 * 9 * 8, 10 * 9 * 8)  # two rows of ten, a pixel between, 8 times larger
    for i, image in enumerate(images[..., 0]):
        top, left = i // 10 * 72, i % 10 * 72
        shown = grid[top:top + 64:8, left:left + 64:8]
        assert np.abs(shown - image).max() <= 1


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("flags, cause", [
    (["--node", "3"], "from 0 to 2"), (["--node", "-1"], "from 0 to 2"),
    (["--preset", "full"], "preset tiny, not full"), (["--classes", "10"], "from 0 to 9"),
    (["--images", "0"], "--images"), (["--batch", "0"], "--batch"), (["--to", "x.gif"], "x.gif"),
    (["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed"), (["--steps", "9"], "--node"),
    (["--seed", "9" * 20], "--seed")])
def test_sampling_refuses_by_name(run, flags, cause):
    assert cause in refusal(sample.main, [str(run), *flags])


def test_what_is_no_finished_run_of_this_problem_and_a_node_of_the_teacher_are_refused(
        run, tmp_path):
    assert "config.json" in refusal(sample.main, [str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"backtrack": {"problem": "toy2d"}}))
    assert "toy2d, not imagenet64" in refusal(sample.main, [str(tmp_path)])
    assert "no stage degrade" in refusal(sample.main, [str(tmp_path), "--node", "0"])
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    weights = load_file(run / "student.safetensors")
    del weights["model.out_conv.bias"]
    save_file(weights, tmp_path / "student.safetensors")
    line = refusal(sample.main, [str(tmp_path)])
    assert "student.safetensors" in line and "out_conv.bias" in line
    (tmp_path / "student.safetensors").unlink()
    assert "--resume" in refusal(sample.main, [str(tmp_path)])
    assert "--node is for" in refusal(sample.main, ["teacher", "--node", "1"])


@pytest.mark.parametrize("name", ["other.safetensors", "other.pkl", "gone.safetensors", "gone.pkl"])
def test_a_teacher_of_another_network_or_none_at_all_is_refused_by_name(tmp_path, name):
    file = tmp_path / name
    if name == "other.safetensors":
        small = problem.NETWORKS["digits"] | {"label_dim": 9}
        save_file(edm.Denoiser(**small).state_dict(), file)
    if name == "other.pkl":
        shutil.copy(ROOT / "tests" / "data" / "edm_pkl_fixture_adm.pkl", file)
    with pytest.raises((disback.Refusal, OSError), match=name):  # run() prints either as a line
        make(problem, "tiny", teacher=str(file))


def test_a_teacher_from_a_file_is_that_teacher(tmp_path):
    net = edm.Denoiser(**problem.NETWORKS["digits"])
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    made = make(problem, "tiny", teacher=str(tmp_path / "mine.safetensors"))
    assert same(made.teacher.state_dict(), net.state_dict())
    assert made.about["teacher_sha256"] == files.sha256(tmp_path / "mine.safetensors")


@pytest.mark.parametrize("main, argv", [(degrade.main, DEGRADE), (backtrack.main, BACKTRACK)])
def test_what_a_run_reads_is_never_among_what_it_replaces(run, tmp_path, refused, main, argv):
    out = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".disback.lock"))
    before = files.sha256(out / "student.safetensors")
    (tmp_path / "other").symlink_to(out)
    for to, place in ((out, tmp_path / "other"), (tmp_path / "other", out)):
        line = refused(main, [*argv, "--out", to, "--overwrite", "--teacher",
                              place / "student.safetensors"])
        assert "student.safetensors is to be read, and would be replaced: name another" in line
    assert files.sha256(out / "student.safetensors") == before
    shutil.copy(out / "student.safetensors", out / "teacher.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "--teacher" in refused(main, [*argv, "--out", out, "--overwrite", "--teacher",
                                         tmp_path / "loop"])
    with pytest.MonkeyPatch.context() as patch:  # that one stays, and may be read
        patch.setattr(problem, "make", lambda *_: pytest.fail("it goes on"))
        with pytest.raises(pytest.fail.Exception, match="it goes on"):
            main([*argv, "--out", str(out), "--overwrite", "--teacher",
                  str(out / "teacher.safetensors")])
        patch.chdir(out / "path")  # from there no word of another setting is a file either
        with pytest.raises(pytest.fail.Exception, match="it goes on"):
            main([*argv, "--out", "..", "--overwrite"])
        patch.chdir(tmp_path)  # where a folder may be named as a setting's value
        shutil.copytree(out, "teacher/run", ignore=shutil.ignore_patterns(".disback.lock"))
        with pytest.raises(pytest.fail.Exception, match="it goes on"):
            main([*argv, "--out", "teacher/run", "--overwrite"])
