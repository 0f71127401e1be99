"""The Fréchet distance against reference data, scipy and closed forms; measuring, cut off."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, refusal
from safetensors.torch import load_file, save_file

import disback
from imagenet64 import digits, features, fid, problem, sample, study
from runtime import errors, files

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
REFERENCE = np.load(ROOT / "tests" / "data" / "fid_reference.npz")


def reference(*names):
    return [torch.from_numpy(REFERENCE[name]) for name in names]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(x, *sizes):
    statistics = fid.Statistics(x.shape[1])
    for batch in x.split(sizes):
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("mean, cov, expected, most", [
    ("mu1", "sigma1", "fid", 1e-10),
    # Singular, 40 samples in 64 dimensions: scipy's root has only 6 digits there.
    ("mu_small", "sigma_small", "fid_small", 2e-6)])
def test_the_distance_is_that_of_the_edm_code_on_its_reference_data(mean, cov, expected, most):
    one, other = reference(mean, cov), reference("mu2", "sigma2")
    found = fid.frechet_distance(*one, *other)
    assert found == pytest.approx(float(REFERENCE[expected]), abs=most)
    assert found == pytest.approx(fid.frechet_distance(*other, *one), abs=1e-10)
    assert fid.frechet_distance(*one, *one) == pytest.approx(0, abs=1e-10)


def test_the_distance_of_independent_gaussians_is_that_of_their_means_and_deviations():
    """Deviations from 1e-6 to 1 all count; the least is far above what rounding can make."""
    std1 = torch.logspace(-6, 0, 30, dtype=torch.float64)
    std2 = torch.cat([randn(20, seed=1).abs(), torch.zeros(10)])
    mean1, mean2 = randn(2, 30, seed=2)
    expected = (mean1 - mean2).square().sum() + (std1 - std2).square().sum()
    found = fid.frechet_distance(mean1, std1.square().diag(), mean2, std2.square().diag())
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_the_distance_of_two_singular_covariances_keeps_all_its_digits():
    """tr sqrt(A A^T B B^T) is the sum of the singular values of A^T B, 64 x 10 and 64 x 20."""
    a, b = 10 * randn(64, 10), 10 * randn(64, 20, seed=1)
    overlap = scipy.linalg.svdvals((a.T @ b).numpy()).sum()
    expected = a.square().sum().item() + b.square().sum().item() - 2 * overlap
    zero = torch.zeros(64)
    assert fid.frechet_distance(zero, a @ a.T, zero, b @ b.T) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("sizes", [(500,), (1, 1, 498), (100, 0, 399, 1)])
def test_statistics_of_batches_are_numpys_of_all_of_them_even_far_from_zero(sizes):
    """In float64 a sum of squares has no digit left at this mean, 1e8 times the deviation."""
    x = 1e6 + 1e-2 * randn(500, 7) @ randn(7, 7, seed=1)
    statistics = statistics_of(x, *sizes)
    assert statistics.n == 500
    torch.testing.assert_close(statistics.mean, torch.from_numpy(x.numpy().mean(0)), rtol=1e-14,
                               atol=0)
    expected = np.cov((x - 1e6).numpy().T, ddof=1)
    np.testing.assert_allclose(statistics.cov.numpy(), expected, rtol=0, atol=1e-6 * 1e-4)


def test_statistics_of_half_precision_features_are_summed_in_double():
    x = (100 + randn(3000, 4)).half()
    expected = np.cov(x.double().numpy().T)
    np.testing.assert_allclose(statistics_of(x, *[30] * 100).cov.numpy(), expected, rtol=1e-12)


def test_features_and_covariances_that_cannot_be_are_refused():
    for n in (0, 1):
        with pytest.raises(disback.Refusal, match=f"at least 2 images, not {n}"):
            statistics_of(randn(n, 3), n).cov  # noqa: B018
    assert "[5] numbers, those of the reference 3" in refusal(fid.Statistics(3).add, randn(4, 5))
    assert "not finite" in refusal(fid.Statistics(2).add, torch.tensor([[0.0, float("nan")]]))
    one, zero = torch.eye(2), torch.zeros(2)
    for mean, cov in ((1e200 * torch.ones(2).double(), one), (zero, torch.inf * one)):
        assert "it is not finite" in refusal(fid.frechet_distance, zero, one, mean, cov)
    assert "negative eigenvalues" in refusal(fid.frechet_distance, zero, one, zero, -one)


# ------------------------------------------------------------------- a measurement, and cut off

IMAGES = (255 * torch.rand(90, 1, 2, 2, generator=torch.Generator().manual_seed(0))).byte()
DATA = torch.zeros(4), torch.eye(4)


def extract(images):
    return images.flatten(1) / 100


def batches(block, done):
    return IMAGES[30 * block + done:30 * (block + 1)].split(5)


def measure(file, batches_of_block=batches, blocks=3, images=30, **about):
    return fid.measure(batches_of_block, extract, DATA, images, blocks, file, about)


def test_a_measurement_has_the_distance_of_each_block_the_least_and_the_mean(tmp_path):
    """tr sqrt(S I) is the sum of the deviations along the axes of S."""
    found = measure(tmp_path / "partial")
    expected = []
    for block in IMAGES.flatten(1).double().div(100).numpy().reshape(3, 30, 4):
        variances = np.linalg.eigvalsh(np.cov(block.T))
        expected.append((block.mean(0)**2).sum() + ((np.sqrt(variances) - 1)**2).sum())
    assert found["distances"] == pytest.approx(expected, rel=1e-6)
    assert found["min"] == min(found["distances"])
    assert found["mean"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["partial"]  # until the result is saved


@pytest.fixture
def cut_at(monkeypatch):
    """cut_at(n, every): interrupt in the place of the n-th batch from now, saving every so many
    images; the list of the batches' sizes."""

    def cut(n, every):
        add, sizes = fid.Statistics.add, []

        def add_or_cut(statistics, batch):
            sizes.append(len(batch))
            if len(sizes) == n:
                raise KeyboardInterrupt
            add(statistics, batch)

        monkeypatch.setattr(fid, "SAVE_EVERY", every)
        monkeypatch.setattr(fid.Statistics, "add", add_or_cut)
        return sizes

    return cut


@pytest.mark.parametrize("served, goes_on_at", [(1, (0, 0)), (5, (0, 20)), (6, (1, 0)),
                                                (11, (1, 20))])
def test_a_measurement_that_was_cut_off_goes_on_and_ends_the_same_to_the_bit(
        cut_at, tmp_path, served, goes_on_at):
    whole, asked = measure(tmp_path / "whole"), []

    def noted(block, done):
        asked.append((block, done))
        return batches(block, done)

    cut_at(served + 1, every=20)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "partial", noted)
    asked.clear()
    assert measure(tmp_path / "partial", noted) == whole
    assert asked[0] == goes_on_at


@pytest.mark.parametrize("other, name", [
    ({"blocks": 2}, "blocks"), ({"images": 29}, "images"), ({"source": "b"}, "source"),
    ({"more": 1}, "more"), ({"source": None}, "source")])
def test_a_partial_file_of_another_measurement_is_refused_naming_what_differs(
        cut_at, tmp_path, other, name):
    cut_at(3, every=5)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "partial", source="a")
    before = (tmp_path / "partial").read_bytes()
    with pytest.raises(disback.Refusal, match=f"partial.* {name} .*remove"):
        about = {"source": "a"} | other
        measure(tmp_path / "partial", **{k: v for k, v in about.items() if v is not None})
    assert (tmp_path / "partial").read_bytes() == before


@pytest.mark.parametrize("size", [25, 35])
def test_a_block_with_too_few_or_too_many_images_is_refused(tmp_path, size):
    with pytest.raises(disback.Refusal, match=f"block 0 has {size} images, not 30"):
        measure(tmp_path / "partial", lambda block, done: IMAGES[:size].split(5))


# -------------------------------------------------------------------------------- the features

@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_images_that_are_not_finite_become_no_bytes(broken):
    assert "images are not finite" in refusal(features.to_uint8, torch.tensor([0.0, broken]))


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 9, dtype=torch.uint8),
                                    torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
                                    torch.zeros(2, 1, 8, 8)])
def test_images_of_another_size_or_type_are_refused(images):
    with pytest.raises(disback.Refusal, match=r"must be uint8 \[1, 8, 8\]"):
        features.Extractor((1, 8, 8), extract, {})(images)


def test_the_classifier_sees_the_digits_where_it_was_trained_between_minus_1_and_1():
    images = digits.load()[0][:100]
    extractor, _ = features.of_digits("cpu")
    torch.testing.assert_close(extractor(features.to_uint8(images)),
                               digits.classifier().features(images), rtol=0, atol=0.2)


class Stand(torch.nn.Module):
    """Stands for Inception: the means of three channels, as TorchScript, called like it."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        means = self.scale * x.float().mean(dim=[2, 3])
        return means if return_features else means.softmax(dim=1)


@pytest.fixture
def inception(tmp_path):
    """The files of a stand-in for Inception and of its reference, N(0, I)."""
    torch.jit.script(Stand()).save(tmp_path / "inception.pt")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    return tmp_path / "inception.pt", tmp_path / "reference.npz"


def test_inception_gets_bytes_and_gives_its_features_not_its_answers(inception):
    extractor, (mean, cov) = features.of_inception(*inception, "cpu")
    x = torch.arange(2)[:, None, None, None].expand(2, 3, 64, 64).byte()
    assert extractor(x).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert mean.tolist() == [0, 0, 0] and cov.equal(torch.eye(3).double())


INFINITE = np.array([[1, np.inf], [np.inf, 1]])


@pytest.mark.parametrize("broken", [{"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.eye(4)},
                                    {"mu": np.zeros(3), "sigma": np.eye(3) * np.nan},
                                    {"mu": np.zeros(3), "sigma": np.diag([1, 1, -1e-3])},
                                    {"mu": np.full(3, 1e200), "sigma": np.eye(3)},
                                    {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
                                    {"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])},
                                    {"mu": np.zeros(1), "sigma": np.array([[np.inf]])},
                                    {"mu": np.zeros(2), "sigma": INFINITE},
                                    {"mu": np.array([None]), "sigma": np.eye(1)}])
def test_a_reference_that_is_none_is_refused_by_name(inception, broken):
    np.savez(inception[1], **broken)
    line = refusal(features.of_inception, *inception, "cpu")
    if len(broken) == 2 and broken["mu"].dtype == float:
        assert "reference.npz holds no mean and covariance as the file of" in line
        assert ("negative eigenvalues" in line) == (broken["sigma"].min(initial=0) < 0)
    assert "reference.npz" in line and "min()" not in line


def test_an_inception_that_may_not_be_read_is_told_with_its_flag(inception, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(files, "sha256", denied)
    assert "if it is yours, or name another --inception" in refusal(
        features.of_inception, *inception, "cpu")


@pytest.mark.parametrize("how", ["gone", "no TorchScript", "not finite"])
def test_an_inception_that_is_none_is_refused_by_name(inception, how):
    inception[0].unlink()
    if how == "no TorchScript":
        inception[0].write_text(how)
    elif how == "not finite":
        torch.jit.script(Stand(float("nan"))).save(inception[0])
    line = refusal(features.of_inception, *inception, "cpu")
    assert "inception.pt" in line and ("not finite" in line) == (how == "not finite")


# --------------------------------------------------------------------------------- the command

def run(capsys, *argv):
    fid.main([*map(str, argv)])
    return json.loads(capsys.readouterr().out)


def save_images(file, images):
    np.savez(file, images.permute(0, 2, 3, 1).numpy())


def test_the_command_measures_an_npz_against_the_digits_and_keeps_the_result(capsys, tmp_path):
    images = features.to_uint8(digits.load()[0])
    extractor, data = features.of_digits("cpu")
    save_images(tmp_path / "half.npz", images[:900])
    found = run(capsys, tmp_path / "half.npz", "--blocks", 2, "--batch", 64)
    expected = [statistics_of(extractor(block), 450) for block in (images[:450], images[450:900])]
    assert found["distances"] == pytest.approx(
        [fid.frechet_distance(s.mean, s.cov, *data) for s in expected], rel=1e-5)
    kept = json.loads((tmp_path / "half.fid-450x2.json").read_text())
    assert kept == found
    assert sorted(f.name for f in tmp_path.iterdir()) == ["half.fid-450x2.json", "half.npz"]


def test_the_command_goes_on_where_it_was_interrupted(capsys, cut_at, tmp_path):
    save_images(tmp_path / "x[1].npz", features.to_uint8(digits.load()[0][:400]))
    argv = [tmp_path / "x[1].npz", "--blocks", 2, "--batch", 50]
    whole = run(capsys, *argv)
    sizes = cut_at(4 + 3, every=100)  # after 100 images of the second block
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *argv)
    torn, other = (tmp_path / f".x[1].fid-{size}.partial.safetensors.a1b2c3d4.unfinished"
                   for size in ("200x2", "9x1"))
    torn.mkdir()
    other.mkdir()
    assert run(capsys, *argv) == whole and len(sizes) == 7 + 2
    assert other.exists() and not torn.exists()


def test_the_command_takes_inception_and_reference_from_files(capsys, tmp_path, inception):
    """Constant images of levels 0 and 2: mean 1, every covariance 4 / 3 with 4 images."""
    images = torch.tensor([0, 2, 0, 2])[:, None, None, None].expand(4, 3, 64, 64).byte()
    save_images(tmp_path / "x.npz", images)
    found = run(capsys, tmp_path / "x.npz", "--preset", "full", "--inception", inception[0],
                "--reference", inception[1])
    assert found["min"] == pytest.approx(3 + (3 * 4 / 3 + 3 - 2 * 4**0.5), rel=1e-9)


def test_the_command_gives_each_block_of_a_run_its_own_seeds_also_where_it_was_interrupted(
        capsys, cut_at, monkeypatch, tmp_path):
    seen = []

    def images(seeds):
        for seed in seeds:
            seen.append(seed)
            x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            yield features.to_uint8(x), None

    monkeypatch.setattr(sample, "config_of", lambda args: problem.TINY)
    monkeypatch.setattr(sample, "source", lambda args: (
        images, {"weights_sha256": "a"}))
    argv = [tmp_path, "--images", 20, "--blocks", 2]
    whole = run(capsys, *argv)
    assert seen == [*range(40)] and len(set(whole["distances"])) == 2
    assert (tmp_path / "fid-20x2.json").exists()
    cut_at(20 + 6, every=5)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *argv)
    seen.clear()
    assert run(capsys, *argv) == whole
    assert seen == [*range(25, 40)]


@pytest.mark.parametrize("what", ["weights_sha256", "reference_sha256", "features_sha256"])
def test_a_cut_off_measurement_is_not_gone_on_with_once_its_parts_have_changed(
        capsys, cut_at, monkeypatch, tmp_path, what):
    (extractor, data), changed = features.of_digits("cpu"), {}
    monkeypatch.setattr(features, "of_digits", lambda device: (
        dataclasses.replace(extractor, about=extractor.about | changed), data))
    monkeypatch.setattr(sample, "config_of", lambda args: problem.TINY)
    monkeypatch.setattr(sample, "source", lambda args: (
        lambda seeds: ((IMAGES[:6, :, :1, :1].repeat(1, 1, 8, 8), None) for _ in seeds),
        {"weights_sha256": "a"} | changed))
    cut_at(2, every=5)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, tmp_path, "--images", 20)
    changed[what] = "b"
    assert f"with other {what[:-7]}: remove it to measure from the start" in refusal(
        run, capsys, tmp_path, "--images", 20)


@pytest.mark.parametrize("broken", [
    {"n": torch.tensor(-1)}, {"mean": torch.zeros(3)}, {"scatter": torch.full((4, 4), torch.nan)},
    {"about": torch.tensor([1.0])}, {"n": None}, {"n": torch.tensor(31)},
    {"distances": torch.zeros(3)}])
def test_a_damaged_partial_file_is_refused_by_name(tmp_path, broken):
    about = {"images": 30, "blocks": 2}
    fid.save(tmp_path / "partial", fid.Statistics(4), [], about)
    kept = load_file(tmp_path / "partial") | broken
    save_file({k: v for k, v in kept.items() if v is not None}, tmp_path / "partial")
    assert "partial cannot be read: remove it" in refusal(
        fid.restore, tmp_path / "partial", 4, about)
    (tmp_path / "partial").write_bytes(b"not tensors")
    assert "partial cannot be read: remove it" in refusal(measure, tmp_path / "partial")


@pytest.mark.parametrize("write", [lambda file: file.write_text("notes"), Path.mkdir,
                                   lambda file: file.write_text("{}")])
def test_what_is_no_result_is_not_replaced_by_one_and_is_told_before_it_is_measured(
        monkeypatch, tmp_path, write):
    monkeypatch.setattr(sample, "config_of", lambda args: problem.TINY)
    monkeypatch.setattr(sample, "source", lambda args: (None, {}))
    monkeypatch.setattr(fid, "measure", lambda *_: pytest.fail("measured"))
    write(tmp_path / "fid-12x1.json")
    said = refusal(fid.main, [str(tmp_path), "--images", "12", "--blocks", "1"])
    assert "fid-12x1.json" in said and "move it" in said


@pytest.mark.parametrize("main, argv, cause", [
    (sample.main, ["--classes", "10"], "--classes"),
    (fid.main, ["--inception", "/none"], "--inception /none is no file"),
    (fid.main, ["--reference", "/none", "--preset", "full"], "--reference /none is no file"),
    (fid.main, ["--reference", __file__], "not for the digits")])
def test_a_mistake_is_told_before_a_teacher_is_trained_or_fetched(monkeypatch, main, argv, cause):
    monkeypatch.setattr(problem, "load_teacher", lambda _: pytest.fail("loaded"))
    assert cause in refusal(main, ["teacher", *argv])


@pytest.mark.parametrize("main", [lambda: sample.main(["teacher"]), lambda: fid.main(["teacher"]),
                                  study.prepare, lambda: problem.make(problem.TINY)])
def test_whoever_trains_the_teacher_does_so_in_one_thread(monkeypatch, tmp_path, main):
    """Its bits, which the cache keeps for all, do not depend on the machine's cores."""
    def train(*_):
        raise RuntimeError(torch.get_num_threads())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path))
    monkeypatch.setattr(problem, "digits_teacher", train)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="1"):
            main()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("main", [sample.main, fid.main])
def test_a_run_of_stage_1_alone_has_nodes(tmp_path, main):
    (tmp_path / "config.json").write_text('{"degrade": {"problem": "imagenet64"}}')
    assert "run backtrack.py, or name a node by --node" in refusal(main, [str(tmp_path)])


def test_a_run_is_measured_on_three_blocks_of_fifty_thousand_unless_told(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(sample, "config_of", lambda args: problem.TINY)
    monkeypatch.setattr(sample, "source", lambda args: (None, {}))
    monkeypatch.setattr(fid, "measure", lambda batches, extract, reference, images, blocks, *rest: (
        asked.append((images, blocks)) or (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        fid.main([str(tmp_path)])
    assert asked == [(50_000, 3)]


def test_a_folder_too_full_for_a_measurement_is_told_before_any_image(monkeypatch, tmp_path):
    save_images(tmp_path / "x.npz", IMAGES[:10])
    monkeypatch.setattr(fid, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda _: SimpleNamespace(
        free=2 * 8 * 64**2 - 1))
    line = refusal(fid.main, [str(tmp_path / "x.npz")])
    assert f"{tmp_path} has less than" in line and "name another folder: copy what is" in line
    (tmp_path / "x.fid-10x1.partial.safetensors").touch()  # what was saved before
    with pytest.raises(pytest.fail.Exception, match="measured"):
        fid.main([str(tmp_path / "x.npz")])


@pytest.mark.parametrize("argv, cause", [
    (["x.npz", "--images", "1"], "at least 2"), (["x.npz", "--node", "1"], "--node and --steps"),
    (["x.npz", "--steps", "9"], "--node and --steps"),
    (["gone.npz"], "gone.npz"), (["gone"], "gone"), (["x.npz", "--images", "0"], "--images"),
    (["x.npz", "--images", "11"], "10 images, too few"), (["x.npz", "--preset", "large"], "large"),
    (["x.npz", "--preset", "full"], "uint8"), (["x.npz", "--reference", "x"], "--reference"),
    (["flat.npz"], "[n, h, w, c]"), (["nchw.npz"], "[n, h, w, c]"),
    (["float.npz"], "uint8"), (["text.npz"], "text.npz is no .npz"),
    (["objects.npz"], "objects.npz"), ([], "RUN"),
    (["empty.npz"], "empty.npz holds 0 images, too few for --blocks 1 of 2"),
    (["x.npz", "--blocks", "11"], "x.npz holds 10 images, too few for --blocks 11 of 2")])
def test_the_command_refuses_by_name(monkeypatch, tmp_path, inception, argv, cause):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "inception_files", lambda args: inception)
    save_images("x.npz", IMAGES[:10].repeat(1, 1, 4, 4))
    save_images("empty.npz", IMAGES[:0].repeat(1, 1, 4, 4))
    np.savez("flat.npz", np.zeros((10, 64), dtype=np.uint8))
    np.savez("nchw.npz", np.zeros((10, 1, 8, 8), dtype=np.uint8))
    np.savez("float.npz", np.zeros((10, 8, 8, 1)))
    np.savez("objects.npz", np.array([None]))
    (tmp_path / "text.npz").write_text("no zip")
    said = refusal(fid.main, argv)
    assert cause in said and "unsafely" not in said  # which numpy would advise


def test_a_folder_named_teacher_is_not_the_teacher(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert fid.parse(["teacher"]).source == "teacher"
    for word in ("teacher/", "./teacher", "./teacher//"):
        assert fid.parse([word]).source == str(tmp_path / "teacher")
    assert fid.parse(["runs/teacher"]).source == "runs/teacher"
