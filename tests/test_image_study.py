"""The study of images: equal budgets, every run once, and a figure from the lines alone."""

import contextlib
import json
import math

import pytest

import disback
from imagenet64 import problem, study

GRID = dict(
    STARTS={"untrained": "An untrained student"}, BOTH={"teacher_steps": 2, "batch": 8},
    STAGE1={"untrained": {"steps": 4, "nodes": 2}}, BUDGET={"untrained": 9}, POINTS=3,
    LEVELS={"untrained": (50,)}, RATES={"untrained": (1e-3, 1e-2)}, TUNING=(100,), SEEDS=(0, 1))


class Evaluation:
    """In the place of the digits' distance, which takes a second."""

    def __init__(self, *_):
        pass

    def __call__(self, student):
        weight = next(student.parameters())
        return {"frechet": weight.square().mean().item(), "accuracy": 0.5}

    def of_halves(self):
        return 1.0


@pytest.fixture(autouse=True)
def small(small_digits, tmp_path, monkeypatch):
    """A grid of two arms, two rates and two judging seeds, and files of its own."""
    files = {"FILE": tmp_path / "lines.jsonl", "FIGURE": tmp_path / "study.png"}
    for name, value in (GRID | files).items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(problem, "Evaluation", Evaluation)


def line(run, ends=(90.0, 9.0)):
    """A line as a run leaves it, whose distance falls to the last of `ends`."""
    start, arm, seed, rate = run
    return {"start": start, "arm": arm, "seed": seed, "rate": rate, "stage1": 0,
            "settings": study.settings(start), "frechet": list(ends),
            "evals": [1000 * (i + 1) for i in range(len(ends))],
            "final": {"frechet": ends[-1], "accuracy": 0.5, "spread": 0.1}}


def write(lines):
    study.FILE.write_text("".join(json.dumps(found) + "\n" for found in lines))


def test_what_stage_1_takes_stage_2_lacks():
    vsd, ours = (study.execute(("untrained", arm, 0, 1e-3)) for arm in study.ARMS)
    assert vsd["stage1"] == 0 and ours["stage1"] > 4 * 4 * 8
    for found in (vsd, ours):
        assert found["evals"][-1] == found["stage1"] + 8 * 8 * found["steps"]
        assert found["frechet"][-1] == pytest.approx(found["final"]["frechet"], abs=1e-3)
    assert vsd["evals"][-1] - 8 * 8 < ours["evals"][-1] <= vsd["evals"][-1] == 9 * 8 * 8


def test_a_run_that_diverges_is_a_line_and_counts_as_infinitely_far():
    found = study.execute(("untrained", "VSD", 0, 1e17))
    assert "try lower learning rates" in found["failed"] and study.distance(found) == math.inf


def test_a_study_killed_after_any_run_goes_on_without_repeating_or_losing_one(monkeypatch):
    done = []

    def execute(run):
        if len(done) % 3 == 2:
            done.append(None)
            raise KeyboardInterrupt
        done.append(run)
        return line(run, (90.0, 100 * run[3]))

    monkeypatch.setattr(study, "execute", execute)
    before = b""
    for _ in range(5):
        with contextlib.suppress(KeyboardInterrupt):
            study.study(study.FILE)
        assert study.FILE.read_bytes().startswith(before)
        before = study.FILE.read_bytes()
    runs = [run for run in done if run]
    assert len(runs) == len(set(runs)) == 2 * (2 * 1 + 2)
    assert set(runs) == set(study.read(study.FILE))
    assert {rate for _, _, seed, rate in runs if seed in study.SEEDS} == {1e-3}


def test_rates_are_chosen_by_the_tuning_seed_alone():
    start, arm = "untrained", "DisBack"
    lines = {run: line(run, (end,)) for run, end in {
        (start, arm, 100, 1e-3): 30.0, (start, arm, 100, 1e-2): 20.0,
        (start, arm, 0, 1e-3): 1.0}.items()}
    assert study.chosen(lines, start, arm) == 1e-2
    lines[start, arm, 100, 1e-2]["failed"] = "it diverged"
    assert study.chosen(lines, start, arm) == 1e-3
    del lines[start, arm, 100, 1e-2]
    assert study.chosen(lines, start, arm) is None


@pytest.mark.parametrize("corrupt, cause", [
    ('{"start": "untrai\n', "JSON"), ("[]\n", "list"), ("again\n", "repeats"),
    ("other\n", "settings"), ("cut", "cut off")])
def test_a_line_that_is_of_no_use_is_refused_by_its_number(corrupt, cause):
    one, two = (line(("untrained", "DisBack", seed, 1e-3)) for seed in (0, 1))
    more = {"again": json.dumps(one), "other": json.dumps(two | {"settings": "batch=7"}),
            "cut": json.dumps(two)}
    write([one])
    with open(study.FILE, "a") as file:
        file.write(corrupt.replace(corrupt.strip(), more.get(corrupt.strip(), corrupt.strip())))
    with pytest.raises(disback.Refusal, match=f"line 2, .*{cause}"):
        study.main(["--figures-only"])


def test_the_figure_is_redrawn_identically_from_the_lines_alone(monkeypatch, capsys):
    monkeypatch.setattr(study, "execute", None)
    lines = [line(("untrained", arm, seed, rate), (90.0, 40.0, 10.0 + seed))
             for arm in study.ARMS for seed in (100, 0, 1) for rate in (1e-3, 1e-2)]
    del lines[4]  # VSD's judged run of seed 1: what is missing is not run
    drawn = []
    for order in (lines, lines[::-1]):
        write(order)
        study.main(["--figures-only"])
        drawn.append((study.FIGURE.read_bytes(), capsys.readouterr().out))
    assert drawn[0] == drawn[1]
    reached = f"{(1 + math.log(90 / 50) / math.log(90 / 40)) / 1e3:.3g}"
    assert f"DisBack, rate 0.001: final 10.5 (10 to 11); to 50 {reached} (" in drawn[0][1]


def test_figures_of_no_lines_are_refused():
    with pytest.raises(disback.Refusal, match="does not exist"):
        study.main(["--figures-only"])
