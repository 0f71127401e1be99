"""The study of images: equal budgets, what is measured on the way, and figures of the lines."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imagenet64 import digits, problem, study
from imagenet64.study import STUDY
from runtime.study import runs_of

SMALL = {"both": {"batch": 8, "teacher_steps": 2}, "stage1": {"steps": 4, "nodes": 2},
         "stage2": {"interval": 1}}


class Evaluation:
    """In the place of the digits' distance, which takes a second."""

    def __init__(self, *_):
        pass

    def __call__(self, student):
        return {"frechet": next(student.parameters()).square().mean().item(), "accuracy": 0.5}


@pytest.fixture
def small(small_digits, monkeypatch):
    """A network, a batch and a budget that take no time."""
    monkeypatch.setattr(study, "BUDGET", 12)
    monkeypatch.setattr(study, "SAMPLES", 20)
    monkeypatch.setitem(study.CELLS, "digits", SMALL)
    monkeypatch.setattr(problem, "Evaluation", Evaluation)


@pytest.mark.parametrize("arm", ["vsd k2", "disback"])
def test_what_stage_1_and_more_updates_of_the_fake_take_iterations_lack(arm, small):
    found = study.advance("digits", arm, 0, ((1e-3, 1e-3), (1e-2, 1e-3)))
    budget, an_iteration = 12 * 8 * 8, (12 if "k2" in arm else 8) * 8
    assert (found["stage1"] > 0.15) == ("disback" in arm)
    spent = found["stage1"] * budget + found["steps"] * an_iteration
    assert budget - an_iteration < spent <= budget
    (run, other) = runs_of({"cell": "digits", "arm": arm, "seed": 0, "rates": [[1, 1], [2, 2]],
                            **found}).values()
    assert run["final"] != other["final"] and len(run["spread"]) == study.POINTS
    assert all(0 < value < 9 for name in ("spread", "bias") for value in run[name])


def test_a_run_that_diverges_is_a_line_and_counts_as_infinitely_far(small):
    found = study.advance("digits", "vsd", 0, ((1e17, 1e17),))
    (run,) = runs_of({"cell": "digits", "arm": "vsd", "seed": 0, "rates": [[1, 1]],
                      **found}).values()
    assert math.isnan(run["final"]["frechet"]) and len(run["bias"]) == study.POINTS
    kept = {"final": {"frechet": None}, "spread": [None] * 3, "bias": [None] * 3}  # as it is read
    assert {study.number(kept, name) for name in ("frechet", "spread", "bias")} == {math.inf}


def test_spread_is_that_within_labels_and_a_fakes_bias_is_measured_as_what_it_is():
    state = torch.get_rng_state()
    diagnosis = study.Diagnosis(SimpleNamespace(
        generate=lambda student, z, cond: 10 * cond.argmax(dim=1)[:, None, None, None] + 0.3 * z,
        sample_inputs=lambda n: (torch.randn(n, 1, 8, 8), None),
        snapshot=lambda: (None, torch.eye(10).repeat(4, 1))))
    assert torch.equal(state, torch.get_rng_state())

    def fake(x, sigma, cond):  # takes every image for one that is brighter
        assert torch.equal(cond.argmax(dim=1), torch.arange(400) % 10)
        return x - sigma * diagnosis.eps + 0.2 * (sigma + 0.5)

    found = diagnosis(None, fake)
    images, classes = (tensor.numpy() for tensor in digits.load())
    variances = [images[classes == label].var(axis=0, ddof=1).mean() for label in range(10)]
    assert found["spread"] == pytest.approx(0.3 / np.sqrt(np.mean(variances)), rel=0.02)
    assert found["bias"] == pytest.approx(0.2, rel=1e-4)


def line(arm, seed, ends):
    """A job's line at two rates, with final distances `ends`."""
    return {"cell": "digits", "arm": arm, "seed": seed, "rates": [[1e-4, 1e-4], [1e-3, 1e-3]],
            "steps": 9, "stage1": 0.1, "final": {"frechet": ends, "accuracy": [1.0, 1.0]},
            "spread": [[0.2, 0.5, 0.9]] * 2, "bias": [[0.3, 0.2, 0.1]] * 2}


def test_the_summary_has_medians_and_ratios_paired_by_seed():
    lines = {}
    for seed in range(3):
        lines |= runs_of(line("vsd", seed, [10.0 + seed, None]))
        lines |= runs_of(line("disback", seed, [(10.0 + seed) * (seed + 1), 7.0]))
    rows = {(row["arm"], row["rate"]): row for row in study.summary(lines)}
    assert rows["vsd", 1e-4]["frechet"] == [11, 10, 12] and rows["vsd", 1e-4]["ratio"][0] == 1
    assert rows["disback", 1e-4]["ratio"] == pytest.approx((2, 1, 3))
    assert rows["vsd", 1e-3]["frechet"][0] == math.inf and rows["disback", 1e-3]["ratio"][0] == 0
    assert rows["vsd", 1e-4]["bias"] == pytest.approx([0.2] * 3)
    assert rows["vsd", 1e-4]["spread"] == [0.9] * 3


def test_figure_and_summary_are_made_of_the_lines_in_any_order(tmp_path):
    lines = {}
    for arm in study.ARMS:
        lines |= runs_of(line(arm, 0, [9.0, 5.0])) | runs_of(line(arm, 1, [8.0, 6.0]))
    drawn = []
    for name, found in (("one", lines), ("two", dict(reversed(lines.items())))):
        (tmp_path / name).mkdir()
        study.draw(tmp_path / name, found)
        drawn.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert drawn[0] == drawn[1] and set(drawn[0]) == {"study.png", "summary.json"}


def test_the_plan_gives_every_arm_the_same_rates_and_seeds():
    jobs = list(STUDY.jobs(STUDY.plan, {}))
    assert len(set(jobs)) == len(jobs) == len(study.ARMS) * len(study.SEEDS)
    assert {job[3] for job in jobs} == {study.RATES}
