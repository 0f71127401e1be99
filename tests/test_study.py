"""The study: every run once, whatever happens; the choices and the statistics are what they say."""

import concurrent.futures
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file

import backtrack
import disback
from runtime import study as statistics
from toy2d import metrics, mixture, model, study, study_figures, study_grid

TINY = (("width", 16), ("depth", 1), ("teacher_steps", 60), ("teacher_batch", 64), ("batch", 64))
RATES = ((1e-3, 1e-3), (1e-2, 1e-2))
BUDGET = {"ring-8-eps": 80, "poor-8-eps": 80}
GRID = study_grid.Grid({"ring-8-eps": ("vsd_tuned",)}, BUDGET, RATES, (100, 101), (0,), TINY)
RUNS = 2 * 2 + 1


def line(cell, arm, seed, rates, swd, **more):
    """A line as a run leaves it, whose SWD falls from 8 to `swd`."""
    curve = {"kevals": [100, 200, 300], "swd": [8.0, 1.0, swd], "mode_tv": [0.9, 0.5, 0.1],
             "off_mode": [1.0, 0.5, 0.2], "mismatch": [0.5, 0.2, 0.1]}
    return {"cell": cell, "arm": arm, "seed": seed, "rates": rates, "steps": 80, "seconds": 1.0,
            "settings": study_grid.settings(GRID, cell, arm), "curve": curve, "stage1": 0,
            "final": {"swd": swd, "mode_tv": 0.1, "off_mode": 0.2}} | more


def write(file, lines):
    file.write_text("".join(json.dumps(found) + "\n" for found in lines))


def by_key(lines):
    return {study_grid.key(found): found for found in lines}


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Here:
    """A pool of no processes, which does the work when it is asked for the result."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        future = concurrent.futures.Future()
        future.set_result(work(*args))
        return future


def test_a_killed_study_leaves_no_worker_and_resumes_without_repeating_or_losing_a_run(
        tmp_path, monkeypatch):
    file = tmp_path / "lines.jsonl"
    code = ("from pathlib import Path; from toy2d import study; from toy2d.study_grid import Grid; "
            f"study.study({GRID!r}, Path({str(file)!r}), 1)")
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True)
    while not file.exists() or file.read_bytes().count(b"\n") < 2:
        assert killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before, patience = file.read_bytes(), 500
    while alive(killed.pid) and patience:  # the workers are of its group
        time.sleep(0.02)
        patience -= 1
    if not patience:
        os.killpg(killed.pid, signal.SIGKILL)
        pytest.fail("a worker outlived its study")
    assert before.endswith(b"\n") and before.count(b"\n") < RUNS
    monkeypatch.setattr(study, "ProcessPoolExecutor", Here)
    study.study(GRID, file, 1)
    after = file.read_bytes()
    assert after.startswith(before)
    runs = [study_grid.key(json.loads(text)) for text in after.splitlines()]
    assert len(runs) == len(set(runs)) == RUNS
    assert set(runs) == set(study_grid.runs(GRID, study_grid.read(file)))


@pytest.mark.parametrize("corrupt", [b'{"cell": "ring-8-eps", "ar\n', b"[]\n", b"\xff\n", b"{}\n"])
def test_a_corrupt_line_is_refused_by_its_number_and_skipped_by_choice_only(tmp_path, corrupt):
    file = tmp_path / "lines.jsonl"
    good = [line("ring-8-eps", "vsd_tuned", seed, RATES[0], 0.2) for seed in (0, 1)]
    texts = [json.dumps(found).encode() + b"\n" for found in good]
    file.write_bytes(texts[0] + corrupt + texts[1])
    with pytest.raises(disback.Refusal, match="line 2, is corrupt.*--skip-corrupt"):
        study_grid.read(file)
    kept = study_grid.read(file, skip_corrupt=True)
    assert list(kept) == [study_grid.key(found) for found in good]


def test_a_line_that_was_cut_off_is_corrupt_and_does_not_swallow_the_next(tmp_path):
    file = tmp_path / "lines.jsonl"
    good = line("ring-8-eps", "vsd_tuned", 0, RATES[0], 0.2)
    file.write_text(json.dumps(good))  # all of it but its end
    with pytest.raises(disback.Refusal, match="line 1, is corrupt"):
        study_grid.read(file)
    with study.appending(file) as append:
        append(good | {"seed": 1})
    assert [key[2] for key in study_grid.read(file, skip_corrupt=True)] == [0, 1]


def test_lines_that_repeat_a_run_or_are_of_other_settings_are_refused(tmp_path):
    file = tmp_path / "lines.jsonl"
    one = line("ring-8-eps", "vsd_tuned", 0, RATES[0], 0.2)
    write(file, [one, one])
    with pytest.raises(disback.Refusal, match="line 2, repeats"):
        study_grid.read(file)
    study_grid.check(GRID, by_key([one]), file)
    with pytest.raises(disback.Refusal, match="ring-8-eps, vsd_tuned of other settings"):
        study_grid.check(GRID, by_key([one | {"settings": "budget=7"}]), file)


def test_two_studies_do_not_write_one_file(tmp_path):
    with (study.appending(tmp_path / "lines.jsonl"),
          pytest.raises(disback.Refusal, match="another study"),
          study.appending(tmp_path / "lines.jsonl")):
        pass


@pytest.mark.parametrize("words, cause", [
    (["--cells", "ring-9-eps"], "ring-9-eps"), (["--arms", "disback", "wgan"], "wgan"),
    (["--quick", "--cells", "uneven-28-eps"], "uneven-28-eps"), (["--jobs", "0"], "--jobs"),
    (["--figures-only", "--out", "nowhere"], "nowhere"), (["--fast"], "--fast")])
def test_what_the_grid_does_not_have_is_refused_by_name(words, cause):
    with pytest.raises(disback.Refusal, match=cause):
        study.main(words)


def test_filters_keep_what_they_name():
    kept = study_grid.select(study_grid.FULL, ["ring-8-eps", "grid-28-eps"],
                             ["disback", "adaptive"])
    assert kept.arms == {"ring-8-eps": ("disback", "adaptive"), "grid-28-eps": ("disback",)}
    assert kept.rates == study_grid.FULL.rates and kept.seeds == study_grid.FULL.seeds


def test_the_seeds_that_judge_are_not_those_that_tune_and_all_arms_may_choose_the_same():
    for grid in (study_grid.FULL, study_grid.QUICK):
        assert not set(grid.tuning) & set(grid.seeds)
        runs, per_arm = study_grid.runs(grid, {}), {}
        for cell, arm, seed, rates in runs:
            if seed in grid.tuning:
                per_arm.setdefault((cell, arm), []).append((seed, rates))
        assert len(set(map(tuple, per_arm.values()))) == 1
        tuned = {(cell, arm) for cell in grid.arms for arm in grid.arms[cell] if arm != "vsd"}
        assert set(per_arm) == tuned


def test_rates_are_chosen_by_the_median_of_the_tuning_seeds_alone():
    grid = study_grid.Grid(GRID.arms, BUDGET, RATES, (100, 101, 102), (0, 1), TINY)
    cell, arm = "ring-8-eps", "disback"
    swds = {RATES[0]: (0.1, 0.5, 0.6), RATES[1]: (0.3, 0.4, 9.0)}  # least mean, least median
    lines = [line(cell, arm, 100 + i, rates, swd)
             for rates in RATES for i, swd in enumerate(swds[rates])]
    assert study_grid.chosen(grid, by_key(lines), cell, arm) == RATES[1]
    lines += [line(cell, arm, seed, RATES[0], 0.001) for seed in grid.seeds]
    assert study_grid.chosen(grid, by_key(lines), cell, arm) == RATES[1]
    diverged = [found | {"failed": "it diverged"} if found["rates"] == RATES[1] else found
                for found in lines]
    assert study_grid.chosen(grid, by_key(diverged), cell, arm) == RATES[0]
    assert study_grid.chosen(grid, by_key(lines[1:]), cell, arm) is None


def test_a_run_is_that_of_the_stages_and_fits_in_the_budget(tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(metrics.Evaluation, "samples", 1000)
    found = study.execute(GRID, ("ring-8-eps", "vsd_tuned", 3, RATES[1]))
    backtrack.main(["toy2d", "--out", str(tmp_path), *SMALL, "--batch", "64", "--seed", "3",
                    "--steps", "80", "--lr-student", "1e-2", "--lr-fake", "1e-2",
                    "--target", "teacher", "--weighting", "eps"])
    direct = json.loads((tmp_path / "metrics.json").read_text())
    assert found["final"]["swd"] == round(direct["swd"], 4)
    path = study.execute(GRID, ("ring-8-eps", "disback", 0, RATES[1]))
    assert path["stage1"] > 4 * 64 * study_grid.STAGE1["steps"]
    budget, spent = 8 * 64 * 80, path["stage1"] + 8 * 64 * path["steps"]
    assert budget - 8 * 64 < spent <= budget
    assert path["curve"]["kevals"][-1] == round(spent / 1e3)
    assert len(path["curve"]["swd"]) >= 12 and path["final"]["swd"] == pytest.approx(
        path["curve"]["swd"][-1], rel=1e-2)
    at = [round((path["stage1"] + 8 * 64 * step) / 1e3) for step in (1, 5, 10, 20)]
    assert [row[0] for row in path["halves"]] == at  # its 29 iterations reach no later look


def test_a_run_that_diverges_is_a_line_and_counts_as_infinitely_far():
    found = study.execute(GRID, ("ring-8-eps", "vsd_tuned", 0, (1e30, 1e30)))
    assert "try lower learning rates" in found["failed"] and study_grid.final_swd(found) == math.inf


def weights(path):
    return [load_file(file) for file in path.files]


@pytest.fixture
def copied(recorded, tmp_path):
    shutil.copytree(recorded / "path", tmp_path / "path")
    return tmp_path / "path"


def test_the_forward_control_meets_the_nodes_as_they_were_recorded_and_the_teacher_last(copied):
    recorded = weights(disback.DegradationPath(copied))
    study.rewrite(copied, "forward")
    target = model.Denoiser(16, 1, 1.0)
    walk = disback.PathScheduler(disback.DegradationPath(copied), target, interval=1)
    met = [target.net[0].weight.clone()]
    while walk.step():
        met.append(target.net[0].weight.clone())
    expected = [recorded[node]["net.0.weight"] for node in (1, 2, 3, 0)]
    assert len(met) == 4 and all(torch.equal(a, b) for a, b in zip(met, expected))
    assert torch.equal(weights(walk.path)[-1]["net.0.weight"], recorded[-1]["net.0.weight"])


def test_the_interpolated_control_lies_on_the_straight_line_between_the_recorded_ends(copied):
    before = disback.DegradationPath(copied)
    recorded, evals = weights(before), before.about["network_evals"]
    study.rewrite(copied, "interpolated")
    path = disback.DegradationPath(copied)
    assert len(path) == 5 and path.about["network_evals"] == evals
    for node, net in enumerate(weights(path)):
        for name, weight in net.items():
            expected = recorded[0][name] + node / 4 * (recorded[-1][name] - recorded[0][name])
            torch.testing.assert_close(weight, expected)


def test_an_exact_teacher_has_no_error_and_a_fakes_error_is_that_of_its_bias():
    data, std = mixture.ring(), 0.5
    own = mixture.Mixture(torch.ones(1), torch.tensor([[8.0, 8.0]]), torch.full((1, 2), std))

    def teacher(x, sigma, cond):
        return data.denoise(x, sigma)

    def biased(x, sigma, cond):
        return own.denoise(x, sigma) + 0.3 * (sigma + 0.5)

    def student(z):
        return own.means + std * z

    state = torch.get_rng_state()
    for net, bias in ((lambda x, sigma, cond: own.denoise(x, sigma), 0.0), (biased, 0.3)):
        errors = study.halves(teacher, net, student, data, 20.0)
        assert errors[0] == 0.0 and errors[1] == pytest.approx(bias, abs=0.02)
    assert torch.equal(state, torch.get_rng_state())


def test_the_bootstrap_interval_of_the_median_is_scipys():
    values = np.random.default_rng(1).lognormal(size=15)
    theirs = scipy.stats.bootstrap((values,), np.median, method="percentile", n_resamples=20_000,
                                   rng=np.random.default_rng(2)).confidence_interval
    median, low, high = statistics.median_interval(values)
    assert median == np.median(values)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=0.05)
    assert statistics.median_interval([1.0, 2.0, math.inf])[2] == math.inf


def test_a_level_is_first_reached_where_an_exponential_curve_crosses_it():
    evals = [0.0, 10.0, 20.0, 30.0]
    curve = [8 * math.exp(-0.1 * at) for at in evals]
    assert statistics.first_reach(evals, curve, 8 * math.exp(-1.7)) == pytest.approx(17)
    assert statistics.first_reach(evals, [*curve[:3], 5.0], curve[2]) == 20
    assert statistics.first_reach(evals, curve, 0.1) == math.inf


def test_a_run_that_never_arrives_loses_and_two_of_them_draw():
    ratio = statistics.paired_ratio
    assert ratio(30, 60, 100) == 0.5 and ratio(30, math.inf, 100) == 0.3
    assert ratio(math.inf, 60, 100) == math.inf and ratio(math.inf, math.inf, 100) == 1


def test_the_comparison_is_paired_by_seed_and_counts_stage_1():
    grid = study_grid.Grid({"ring-8-eps": ("vsd_tuned", "disback")}, {"ring-8-eps": 150}, RATES[:1],
                      (100,), (0, 1, 2))
    lines = []
    for arm in grid.arms["ring-8-eps"]:
        lines.append(line("ring-8-eps", arm, 100, RATES[0], 0.2))
        for seed in grid.seeds:
            found = line("ring-8-eps", arm, seed, RATES[0], 0.2, steps=150)
            reached = (100 + 50 * seed) * (0.5 if arm == "disback" else 1)
            found["curve"] |= {"kevals": [reached, 300], "swd": [0.2, 0.2]}
            lines.append(found)
    result = study_figures.compare(grid, by_key(lines), "ring-8-eps")
    assert result["ratio"] == (0.5, 0.5, 0.5) and result["level"] == 0.2
    assert result["vsd_share"][0] == pytest.approx(150e3 / (150 * 8 * 256))


def test_the_figures_are_redrawn_identically_from_the_lines(tmp_path):
    grid = study_grid.Grid({"poor-8-eps": ("vsd_tuned", "disback", "adaptive", "n3_i33"),
                       "ring-8-eps": ("vsd_tuned", "disback")}, BUDGET, RATES, (100,), (0, 1, 2))
    lines = [line(cell, arm, seed, rates, 0.1 + 0.01 * seed + 0.05 * (arm == "disback"),
                  halves=[[100, 0.5, 0.4], [300, 0.1, 0.2]])
             for cell, arms in grid.arms.items() for arm in arms for rates in RATES
             for seed in (100, *grid.seeds)]
    drawn = []
    for name, order in (("one", lines), ("two", lines[::-1])):  # parallel runs end in any order
        (tmp_path / name).mkdir()
        study_figures.draw(tmp_path / name, grid, by_key(order))
        judged = study_figures.judged(grid, by_key(order), "ring-8-eps", "disback")
        assert [found["seed"] for found in judged] == [0, 1, 2]
        drawn.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert len(drawn[0]) == 7 and drawn[0] == drawn[1]
