"""What the toy logs and draws of a run: the student's spread, the fake's bias, the page."""

import gc
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKTRACK, TINY, make, read
from PIL import Image
from safetensors.torch import load_file

import backtrack
from runtime import files
from toy2d import diagnosis, figures, mixture, model, problem


class Exact(torch.nn.Module):
    """The denoiser of a mixture, as a network: it has a parameter, which says where it is."""

    def __init__(self, data):
        super().__init__()
        self.data, self.where = data, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, cond=None):
        return self.data.denoise(x, sigma)


class Blob(torch.nn.Module):
    """A student G(z) = mean + std z."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = torch.nn.Parameter(torch.tensor(mean)), std

    def forward(self, z):
        return self.mean + self.std * z


def gaussian(mean, std):
    return mixture.round_modes(torch.ones(1), torch.tensor([mean]), torch.tensor([std]))


def test_the_bias_of_an_exact_fake_is_0_and_of_a_shifted_one_the_closed_form():
    """The fake of N(m', s^2) at samples of N(m, s^2): E[D - x0] = sigma^2 (m' - m) / (s^2 +
    sigma^2), by D = (s^2 x + sigma^2 m') / (s^2 + sigma^2)."""
    torch.manual_seed(0)
    x0, eps = torch.tensor([3.0, 1.0]) + 0.5 * torch.randn(200_000, 2), torch.randn(200_000, 2)
    exact, shifted = (Exact(gaussian(mean, 0.5)) for mean in ([3.0, 1.0], [6.0, 5.0]))
    expected = sum(s**2 * 5 / (0.25 + s**2) / (s + 0.5) for s in diagnosis.LEVELS) / 3
    with torch.no_grad():
        assert diagnosis.bias(exact, x0, eps) < 0.003
        assert diagnosis.bias(shifted, x0, eps) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("data", [mixture.ring(), mixture.uneven(), mixture.ring16()])
def test_an_exact_teacher_has_no_error_and_the_students_place_and_spread_are_told(data):
    mean = torch.arange(1.0, 1 + data.dims)
    student = Blob(mean.tolist(), 0.5)
    watch = diagnosis.Diagnosis(data, Exact(data), student, n=100_000 // data.dims)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = watch(student, Exact(data))
    assert torch.equal(torch.get_rng_state(), state)  # a line of the log changes no training
    assert found["teacher_error"] < 1e-6
    assert found["spread"] == pytest.approx(0.5, rel=0.02)
    away = (mean - sum(w * m for w, m in zip(data.weights, data.means))).norm().item()
    assert found["data_distance"] == pytest.approx(away, rel=0.01)


def test_the_teacher_that_is_diagnosed_is_not_the_target_that_walks():
    made = make(problem, **TINY)
    before = made.diagnose(made.student, made.teacher)["teacher_error"]
    with torch.no_grad():
        for weight in made.teacher.parameters():
            weight.zero_()
    assert made.diagnose(made.student, made.teacher)["teacher_error"] == before


def test_a_look_keeps_what_fake_and_target_answer_on_a_grid_around_the_students_mean():
    """In 16 dimensions the grid lies in the plane that goes through the student's mean."""
    data = mixture.ring16()
    fake, target = Exact(data), Exact(mixture.Mixture(data.weights, data.means + 1, data.stds))
    student = Blob([0.0] * 15 + [8.0], 0.5)
    watch = diagnosis.Diagnosis(data, fake, student)
    seen = watch.look(student, fake, target)
    grid = watch.grid()
    low, high = watch.limits
    assert grid.shape == (169, 2) and low < grid.min() < grid.max() < high
    x = student(watch.z).mean(dim=0).repeat(169, 1).detach()
    x[:, :2] = grid
    for name, net in (("fake", fake), ("target", target)):
        for answer, level in zip(seen[name], diagnosis.LEVELS):
            torch.testing.assert_close(answer, net.data.denoise(x, level)[:, :2])
    torch.testing.assert_close(seen["student"], student(watch.z)[:, :2])


def test_the_numbers_and_samples_of_the_page_are_those_of_the_log_and_of_the_snapshots(pair):
    run = pair / "main"
    page = (run / "figures" / "trajectory.html").read_text()
    shown = json.loads(re.search(r"^const run = (.*);$", page, re.M).group(1))
    assert [frame["numbers"] for frame in shown["frames"]] == read(run / "log.jsonl")
    for frame in shown["frames"]:
        kept = load_file(run / "snapshots" / f"{frame['numbers']['step']:07d}.safetensors")
        assert frame["node"] == kept["node"].item()
        expected = (kept["student"][:500] * 100).round()
        torch.testing.assert_close(torch.tensor(frame["student"]).float(), expected)
        arrows = kept["target"] - torch.tensor(shown["grid"]) / 100
        torch.testing.assert_close(torch.tensor(frame["target"]) / 100, arrows, atol=0.02, rtol=0)
    assert len(shown["nodes"]) == 5 and len(page) < 3e6
    assert not re.search(r"https?://|src=|@import", page)  # it opens without a network


def test_the_pictures_hold_both_runs_students_but_no_sample_astray(pair, tmp_path, monkeypatch):
    shutil.copytree(pair, tmp_path / "pair")
    main, other = tmp_path / "pair" / "main", tmp_path / "pair" / "vsd"
    for run, far in ((main, -50.0), (other, 70.0)):
        file = sorted((run / "snapshots").iterdir())[1]
        kept = load_file(file)
        kept["student"][7:, 1] = far
        kept["student"][5] = 10 * far
        files.save_tensors(file, kept)
    limits = []
    for name in ("draw_mismatch", "draw_convergence", "draw_mechanism"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    for owner, name in ((figures, "draw_path"), (figures, "draw_gif"),
                        (figures.trajectory, "write")):
        monkeypatch.setattr(owner, name, lambda *given: limits.append(given[-1]))
    figures.draw(main, None, other, torch.nn.Identity(), lambda net, n: torch.full((n, 2), 100.0),
                 mixture.ring(), SimpleNamespace(grid=lambda: None))
    assert limits == [pytest.approx((-57.5, 107.5))] * 3


def test_the_errors_percentage_is_said_to_be_of_all_dimensions_where_two_are_drawn(
        monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.append(figure))
    for data in (mixture.ring(), mixture.ring16()):
        figures.draw_mismatch(tmp_path / "x.png", None, Exact(data), data.sample(60), data)
    plain, more = (figure.get_suptitle() for figure in drawn)
    assert more == plain + ", in all 16 dimensions (two are drawn)"


def test_the_datas_spread_is_in_sight_above_every_runs(pair, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.append(figure))
    data = mixture.Mixture.of_samples(torch.tensor([[-90.0, 0.0], [90.0, 0.0]]))
    figures.draw_mechanism(tmp_path / "x.png", [pair / "main"], data)
    axis = drawn[0].axes[1]
    (text,) = [text for text in axis.texts if text.get_text() == "the data's"]
    assert 60 < text.get_position()[1] < 0.9 * axis.get_ylim()[1]


@pytest.mark.parametrize("compared", ["short", "long"])
def test_the_film_ends_with_the_longer_run_and_says_of_the_other_no_more_than_it_has(
        tmp_path, monkeypatch, compared):
    runs = [tmp_path / name for name in ("long", "short")]
    if compared == "long":
        runs.reverse()
    ends = {"long": (0, 20, 200, 300, 390), "short": (0, 20)}
    for run in runs:
        for step in ends[run.name]:
            files.save_tensors(run / "snapshots" / f"{step:07d}.safetensors", {
                "x0": torch.zeros(4, 2), "student": torch.full((4, 2), float(step)),
                "node": torch.tensor(0)})
        files.save_json(run / "metrics.json", {"method": "vsd", "fake_init": "teacher"})
    films = []

    def film(*given):
        films.append(given)
        return SimpleNamespace(save=lambda beside, _: beside.touch())

    monkeypatch.setattr(figures, "FuncAnimation", film)
    figures.draw_gif(tmp_path / "film.gif", runs, [torch.zeros(4, 2)], torch.zeros(4, 2), (-1, 1))
    ((figure, show, shown),) = films
    assert sorted(set(shown)) == [0, 20, 390] and len(shown) > 10
    show(shown[-1])
    lasts = [ends[run.name][-1] for run in runs]
    assert [axis.get_title() for axis in figure.axes] == [
        f"VSD ({run.name}), iteration {last}: to the teacher" for run, last in zip(runs, lasts)]
    assert [axis.lines[2].get_xdata()[0] for axis in figure.axes] == lasts
    (step, *later) = figures.moments([*range(0, 151, 5), *range(200, 2001, 100)])[-5:]
    assert (step, later) == (400, [800, 1200, 1600, 2000])


def test_runs_in_16_dimensions_and_without_a_path_end_with_all_figures_of_one_beside_another(
        pair, tmp_path):
    backtrack.main(["toy2d", "--preset", "ring16", "--out", str(tmp_path), *BACKTRACK,
                    "--target", "teacher", "--steps", "5"])
    names = {"mismatch.png", "path.png", "convergence.png", "mechanism.png", "backtracking.gif",
             "trajectory.html"}
    for run in (pair / "main", tmp_path):
        assert {file.name for file in (run / "figures").iterdir()} == names
    both, one = (Image.open(run / "figures" / "backtracking.gif")
                 for run in (pair / "main", tmp_path))
    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(files, "rank", lambda: 1)  # draws none, and says nothing
        figures.draw_gif(tmp_path / "none.gif", [tmp_path], [], torch.zeros(1, 2), (-1, 1))
        gc.collect()
    assert not (tmp_path / "none.gif").exists() and not said
    assert both.width > 1.8 * one.width and both.height == one.height
    assert both.n_frames >= 5
    student = load_file(tmp_path / "student.safetensors")
    model.Untrained(8.0, 16, 1, 16).load_state_dict(student)
    assert read(tmp_path / "metrics.json")["off_plane"] >= 0
