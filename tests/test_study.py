"""The study: its batched runs are the stages' own, its lines are read strictly, its statistics are
what they say."""

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import tqdm
from conftest import TINY, read
from processes import SERVER
from safetensors.torch import load_file

import backtrack
import degrade
import disback
from imagenet64 import study as image_study
from runtime import study as statistics
from runtime import workers
from runtime.study import words
from toy2d import mixture, study, study_figures, study_runs
from toy2d.study import STUDY

CELL = {"both": TINY | {"batch": 64},
        "stage2": {"weighting": "eps", "interval": 2, "ema": 0.5}}  # averages follow soon
STAGE1 = {"steps": 12, "nodes": 4}
RATES = ((1e-3, 4e-3), (1e-2, 5e-3))


@pytest.mark.parametrize("arm", [
    {"stage1": STAGE1}, {"stage2": {"target": "teacher", "fake_updates": 2}},
    {"stage1": STAGE1, "stage2": {"target": "teacher", "fake_init": "degraded"}}], ids=str)
def test_runs_advanced_together_are_those_of_the_stages(arm, tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(study_runs, "LEVELS", (1e9, 0.0))  # reached at once, and never
    together = study_runs.advance(tmp_path, CELL, arm, 3, RATES, 25, drawn=RATES[1])
    assert together["reach"] == [[1 / together["steps"], math.inf]] * 2
    for name in ("swd", "spread", "away", "bias", "teacher"):
        assert together[name][0] is None and all(map(math.isfinite, together[name][1]))
    for i, (lr_student, lr_fake) in enumerate(RATES):
        out, both = tmp_path / str(i), CELL["both"] | {"seed": 3}
        if "stage1" in arm:
            degrade.main(["toy2d", "--out", str(out), *words(both | arm["stage1"])])
        backtrack.main(["toy2d", "--out", str(out), *words(
            both | CELL["stage2"] | arm.get("stage2", {}) | {
                "steps": together["steps"], "lr_student": lr_student, "lr_fake": lr_fake})])
        alone = read(out / "metrics.json")
        for name in ("swd", "off_mode", "mode_tv"):
            assert together["final"][name][i] == pytest.approx(alone[name], rel=1e-4, abs=2e-4)
        budget = 25 * 8 * 64
        assert budget - 12 * 64 < alone["network_evals"]["total"] <= budget
        assert together["stage1"] == pytest.approx(alone["network_evals"]["stage1"] / budget)
    assert together["final"]["swd"][0] != pytest.approx(together["final"]["swd"][1], rel=1e-2)


def test_a_fake_that_is_the_teacher_moves_no_student(tmp_path, no_figures):
    args, problem, path = backtrack.prepare(["toy2d", "--out", str(tmp_path), *words(
        CELL["both"] | CELL["stage2"] | {"target": "teacher"})])
    runs = study_runs.Runs(args, problem, path, RATES)
    before = [weight.detach().clone() for weight in runs.student.parameters()]
    for moves in (False, True):  # Eq. 8 is exactly 0 until the fake has learnt
        runs.iterate()
        assert moves != all(map(torch.equal, before, runs.student.parameters()))


@pytest.mark.parametrize("control", ["forward", "interpolated", "wait"])
def test_a_control_changes_the_nodes_between_the_ends_alone(control, tmp_path):
    flags = CELL["both"] | STAGE1
    study_runs.record(tmp_path / "as it was", flags, None)
    study_runs.record(tmp_path / "changed", flags, control)
    old, new = ([load_file(file)["net.0.weight"] for file in
                 disback.DegradationPath(tmp_path / name / "path").files]
                for name in ("as it was", "changed"))
    expected = {"forward": [old[i] for i in (0, 3, 2, 1, 4)],
                "interpolated": [old[0] + i / 4 * (old[4] - old[0]) for i in range(5)],
                "wait": [old[0], old[4], old[4], old[4], old[4]]}[control]
    assert len(new) == 5 and not torch.equal(new[1], old[1])
    for weight, right in zip(new, expected):
        torch.testing.assert_close(weight, right)


def test_an_exact_teacher_has_no_error_and_a_fakes_bias_is_measured_as_what_it_is():
    data, std = mixture.ring(), 0.5
    own = mixture.Mixture(torch.ones(1), torch.tensor([[3.0, 4.0]]), torch.full((1, 2), std))
    problem = SimpleNamespace(sample_sigma=lambda n: torch.rand(n, 1) + 0.1)
    runs = SimpleNamespace(
        runs=2, problem=problem, teacher=data.denoise, student=lambda z: own.means + std * z,
        each=lambda drawn: drawn.repeat(2, 1),
        fake=lambda x, sigma: own.denoise(x, sigma) + torch.tensor([0.3, 0.4]) * (sigma + 0.5))
    state = torch.get_rng_state()
    found = study_runs.Watch(runs, data).mechanism()
    assert torch.equal(state, torch.get_rng_state())
    assert found["teacher"] == [0.0, 0.0] and found["away"] == pytest.approx([5, 5], abs=0.1)
    assert found["bias"] == pytest.approx([0.5, 0.5], abs=0.03)
    extent = math.sqrt(4 + 2 * 0.15**2)  # of eight round modes at radius 2
    assert found["spread"] == pytest.approx([std * 2**0.5 / extent] * 2, rel=0.05)


def line(cell="4D d8", arm="vsd", seed=0, rates=study.ALIKE[:2], swd=0.2, **more):
    """A line as a job leaves it, whose SWD falls at 0.08 of stage 2 to `swd`."""
    reach = [0.08 if swd and swd <= level else None for level in study_runs.LEVELS]
    curves = dict.fromkeys(("swd", "spread", "away", "bias", "teacher"), [[8.0] * 4 + [swd] * 12])
    return {"cell": cell, "arm": arm, "seed": seed, "rates": [list(pair) for pair in rates],
            "settings": STUDY.settings(cell, arm), "steps": 100, "stage1": 0.0,
            "reach": [reach for _ in rates],
            "final": {"swd": [swd for _ in rates], "off_mode": [0.1 for _ in rates],
                      "mode_tv": [0.1 for _ in rates]},
            **study_runs.only(study_figures.DRAWN, rates,
                              {name: one * len(rates) for name, one in curves.items()})} | more


def runs(*lines):
    return {key: run for one in lines for key, run in statistics.runs_of(one).items()}


def write(file, *texts):
    file.write_text("".join(texts))
    return file


@pytest.mark.parametrize("second, cause", [
    ('{"cell": "4D d8", "ar\n', "line 2"), ("[]\n", "line 2"),
    (json.dumps(line(seed=1)), "cut off"), (json.dumps(line()) + "\n", "repeats"),
    (json.dumps(line(seed=1, settings=7)) + "\n", "other settings")])
def test_a_line_that_is_of_no_use_is_refused_by_its_number(second, cause, tmp_path):
    file = write(tmp_path / "lines.jsonl", json.dumps(line()) + "\n", second)
    with pytest.raises(disback.Refusal, match=f"line 2, is of no use.*{cause}|{cause}, is of no"):
        STUDY.read(file)


def test_every_run_of_the_plan_is_run_once_and_what_there_is_is_not_repeated():
    plan = [(("4D d8",), ("vsd", "adaptive"), study.ALIKE[:2], (0,)),
            (("4D d8",), ("vsd",), study.ALIKE, (0, 1))]
    jobs = list(STUDY.jobs(plan, {("4D d8", "vsd", 0, study.ALIKE[0]): {}}))
    assert jobs == [("4D d8", "vsd", 0, study.ALIKE[1:2]),
                    ("4D d8", "adaptive", 0, study.ALIKE[:1]),
                    ("4D d8", "adaptive", 0, study.ALIKE[1:2]),  # alone, as its mismatch is one's
                    ("4D d8", "vsd", 0, study.ALIKE[2:]), ("4D d8", "vsd", 1, study.ALIKE)]
    for whole in (study.PLAN, study.QUICK):
        keys = [(*job[:3], pair) for job in STUDY.jobs(whole, {}) for pair in job[3]]
        assert len(keys) == len(set(keys))


def test_no_arm_of_a_cell_is_denied_a_rate_or_a_seed():
    found = {}
    for cell, arm, seed, rates in STUDY.jobs(study.PLAN, {}):
        found.setdefault((cell, arm), set()).update((seed, pair) for pair in rates)
    for cell in study.CELLS:
        arms = [found[cell, arm] for arm in study.MAIN if (cell, arm) in found]
        assert all(set(found[cell, "vsd"]) >= of_arm for of_arm in arms)
        assert found[cell, "vsd"] == found[cell, "disback"]


def test_a_study_that_was_stopped_goes_on(tmp_path, monkeypatch):
    plan = [(("4D d8",), ("vsd", "disback"), study.ALIKE[:2], (0, 1))]
    executed, file = [], tmp_path / "lines.jsonl"

    def advance(*job):
        executed.append(job)
        if len(executed) == 3:
            raise KeyboardInterrupt
        return {name: line(*job)[name] for name in ("steps", "stage1", "final", "reach")}

    monkeypatch.setattr(workers, "work", lambda function, jobs, _, take: [
        take(function(job)) for job in jobs])
    stopped = dataclasses.replace(STUDY, advance=advance)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(plan, file, 1)
    before = file.read_bytes()
    stopped.run(plan, file, 1)
    assert before.count(b"\n") == 2 and file.read_bytes().startswith(before)
    assert executed[2:4] == [executed[2]] * 2 and len(set(executed)) == 4 == len(executed) - 1
    assert len(STUDY.read(file)) == 8


def test_a_worker_that_is_killed_ends_the_study_in_a_line(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SERVER)
    with pytest.raises(disback.Refusal, match="killed.* fewer --jobs"):
        workers.work(os._exit, [9], 1, print)


def test_workers_that_have_done_all_jobs_end_by_themselves(monkeypatch):
    """Killed ones leave semaphores behind, of which Python warns."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SERVER)
    kill, killed, taken = SERVER.Process.kill, [], []
    monkeypatch.setattr(SERVER.Process, "kill", lambda worker: (killed.append(1), kill(worker)))
    workers.work(abs, [-2], 1, taken.append)
    assert (taken, killed) == ([2], [])


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_is_blocked_while_workers_start_who_inherit_it(monkeypatch, fails):
    seen = []

    def blocked():
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    class Pool(contextlib.nullcontext):
        """Starts none, and runs a job at once."""

        def __enter__(self):
            return self

        def submit(self, function, job):
            seen.append(blocked())
            if fails:
                raise OSError
            done = Future()
            done.set_result(function(job))
            return done

    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *_: Pool())
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        workers.work(abs, [-2], 1, lambda found: seen.append(blocked()))
    assert seen == ([True] if fails else [True, False]) and not blocked()


def test_an_interrupt_waits_for_no_job(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SERVER)

    def interrupted(_):
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workers.work(time.sleep, [0, 300, 300], 2, interrupted)
    assert time.monotonic() - began < 150


def leave_something(sleep):
    """As a job does that is killed: a folder in the temporary one, and a progress bar."""
    made = tempfile.mkdtemp()
    list(tqdm.trange(1, file=io.StringIO()))
    sleep(300)
    return made, type(tqdm.tqdm.get_lock()).__module__


def test_workers_leave_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SERVER)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    taken = []

    def interrupted(found):
        taken.append(found)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.work(leave_something, [bool, time.sleep], 2, interrupted)
    ((made, lock),) = taken
    assert made.startswith(str(tmp_path)) and not list(tmp_path.iterdir())
    assert lock == "_thread"  # of multiprocessing it would be a semaphore


@pytest.mark.parametrize("of_study", [STUDY, image_study.STUDY])
def test_a_study_can_be_sent_to_its_workers(of_study):
    assert pickle.loads(pickle.dumps(of_study)) == of_study


@pytest.mark.parametrize("change", [
    {"reach": ...}, {"final": {"swd": [1.0], "mode_tv": [1.0]}}, {"seed": None}, {"seed": "0"},
    {"steps": None}, {"stage1": None}, {"rates": [["a", "b"]]}, {"reach": [["none"]]},
    {"final": {"swd": ["a"], "mode_tv": [1.0], "off_mode": [1.0]}}, {"more": ["a"]}])
def test_a_line_that_lacks_what_the_figures_need_is_refused(tmp_path, change):
    good = line("4D d8", "vsd", 0, study.ALIKE[:1])
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(good) + "\n")
    assert len(STUDY.read(file)) == 1
    changed = {name: value for name, value in (good | change).items() if value is not ...}
    file.write_text(json.dumps(changed) + "\n")
    with pytest.raises(disback.Refusal, match="line 1, is of no use: remove it"):
        STUDY.read(file)


def test_what_all_jobs_need_is_made_before_them_and_only_for_them(tmp_path, monkeypatch):
    made, file = [], tmp_path / "lines.jsonl"
    monkeypatch.setattr(workers, "work", lambda *_: made.append("jobs"))
    prepared = dataclasses.replace(STUDY, prepare=lambda: made.append("teacher"))
    prepared.run(study.QUICK, file, 1)
    prepared.run([], file, 1)
    assert made == ["teacher", "jobs", "jobs"]


def test_two_studies_do_not_write_one_file(tmp_path):
    with (statistics.appending(tmp_path / "lines.jsonl"),
          pytest.raises(disback.Refusal, match="another study"),
          statistics.appending(tmp_path / "lines.jsonl")):
        pass


def test_four_digits_are_kept_and_a_run_that_diverged_has_none_and_never_arrives():
    kept = statistics.rounded({"swd": [[0.123456, 1234.4], [math.nan, math.inf]], "steps": 1000})
    assert kept == {"swd": [[0.1235, 1234.0], [None, None]], "steps": 1000}
    (run,) = runs(line(rates=study.ALIKE[:1], swd=None)).values()
    assert study_figures.end(run) == math.inf == study_figures.cost("4D d8", run)
    assert study_figures.arrived([run])[0] == 0


def test_the_share_that_arrives_has_wilsons_interval():
    found = runs(*(line(seed=seed, rates=study.ALIKE[:1], swd=0.2 if seed < 7 else 0.9)
                   for seed in range(10)))
    share, low, high = study_figures.arrived([*found.values()])
    z, n, p = 1.959964, 10, 0.7
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert share == 0.7
    assert (low, high) == pytest.approx(((middle - half) / (1 + z**2 / n),
                                         (middle + half) / (1 + z**2 / n)), rel=1e-4)


def test_a_cost_counts_stage_1_and_is_of_the_rate_that_the_other_seeds_choose():
    slow, fast = study.ALIKE[:2]
    found = {}
    for seed in range(4):  # the even seeds are quicker at the first rate, the odd at the second
        for rates in (slow, fast):
            good = (seed % 2 == 0) == (rates == slow)
            found |= runs(line(seed=seed, rates=(rates,), swd=0.3 if good else 0.9))
    costs = study_figures.costs(found, "4D d8", "vsd")
    assert costs == {seed: math.inf for seed in range(4)}
    (run,) = runs(line(rates=(slow,), swd=0.3, stage1=0.5)).values()
    reached = 0.5 + 0.5 * 0.08
    assert study_figures.cost("4D d8", run) == pytest.approx(reached)
    (run,) = runs(line(rates=(slow,), swd=0.5, stage1=0.5)).values()
    assert study_figures.cost("16D d8", run) == pytest.approx(reached)
    assert study_figures.cost("4D d8", run) == math.inf


def test_a_ratio_is_paired_by_seed():
    found = {}
    for seed in range(3):
        for arm, share in (("vsd", 0.08 * (1 + seed)), ("disback", 0.02 * (1 + 2 * seed))):
            found |= runs(line(seed=seed, arm=arm, reach=[[None, share, None]] * 2))
    expected = [(1 + 2 * seed) / 4 / (1 + seed) for seed in range(3)]
    assert study_figures.ratio(found, "4D d8", "disback")[0] == pytest.approx(np.median(expected))


def test_the_figures_are_redrawn_identically_from_the_lines(tmp_path):
    lines = [line("4D d8", arm, seed, swd=0.2 + 0.1 * seed)
             for arm in ("vsd", "disback", "forward") for seed in (0, 1, 200)]
    drawn = []
    for name, order in (("one", lines), ("two", lines[::-1])):  # processes end in any order
        (tmp_path / name).mkdir()
        study_figures.draw(tmp_path / name, runs(*order), study.LATER)
        drawn.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert len(drawn[0]) == 6 and drawn[0] == drawn[1]
    rows = json.loads(drawn[0]["summary.json"])
    assert [row["runs"] for row in rows["seeds"]] == 6 * [2]
    assert [row["runs"] for row in rows["fresh seeds"]] == 6 * [1]
    assert rows["another processor"] == []


def test_the_window_that_is_looked_at_first_has_three_cells_and_the_other_all(
        monkeypatch, tmp_path):
    titles = {}
    monkeypatch.setattr(study_figures, "save", lambda figure, file: titles.update(
        {file.stem: [axis.get_title().partition(":")[0] for axis in figure.axes]}))
    found = runs(*(line(cell, arm, 0) for cell in ("16D d8", "4D d8", "2D d4", "2D d8")
                   for arm in ("vsd", "disback")))
    study_figures.draw(tmp_path, found, study.LATER)
    assert titles["window"] == ["2D d8", "4D d8", "16D d8"]
    assert [name for name in titles["windows"] if name] == ["2D d4", *titles["window"]]


def test_the_map_counts_arrivals_at_the_rates_that_both_have():
    found = runs(*(line(cell, arm, seed, swd=0.2 if seed or arm == "disback" else 0.9)
                   for cell in ("2D d4", "16D d8") for arm in ("vsd", "disback")
                   for seed in range(4)), line("2D d4", "vsd", 0, study.ALIKE[4:]))
    found |= runs(*(line("16D d8", "linear", seed, swd=0.2 if seed < 2 else 0.9)
                    for seed in range(4)), line("2D d4", "linear", 0))  # of one seed: not shown
    texts = [text.get_text() for text in study_figures.draw_map(found, ["2D d4", "16D d8"])
             .axes[0].texts]
    assert [text.splitlines()[:2] for text in texts] == 2 * [["VSD 75% of 8", "DisBack 100%"]]
    assert ["linear" in text for text in texts] == [False, True]
    assert "linear 50%" in texts[1]


def test_the_figure_of_costs_has_no_mark_where_no_arm_gets_to_the_level():
    found = runs(*(line(cell, arm, reach=[[None, share, None]] * 2)
                   for cell, arm, share in (("2D d4", "vsd", 0.1), ("2D d4", "disback", 0.2),
                                            ("2D d8", "vsd", None), ("2D d8", "disback", None))))
    axis = study_figures.draw_cost(found, ["2D d4", "2D d8"]).axes[0]
    assert [round(mark.lines[0].get_ydata()[0]) for mark in axis.containers] == [0]


def test_the_summary_is_that_of_the_lines(tmp_path):
    study_figures.write_summary(tmp_path / "again.json",
                                STUDY.read(study.FOLDER / "lines.jsonl"), study.LATER)
    assert (tmp_path / "again.json").read_bytes() == (study.FOLDER / "summary.json").read_bytes()


def test_no_figures_are_drawn_of_no_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/study/toy2d").mkdir(parents=True)
    (tmp_path / "runs/study/toy2d/lines.jsonl").touch()
    with pytest.raises(disback.Refusal, match="no runs yet"):
        STUDY.main(["--quick", "--figures-only"])


@pytest.mark.parametrize("argv, cause", [(["--jobs", "0"], "--jobs"), (["--fast"], "--fast")])
def test_what_the_study_does_not_have_is_refused_by_name(argv, cause):
    with pytest.raises(disback.Refusal, match=cause):
        STUDY.main(argv)


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


@pytest.mark.parametrize("more", [[], ["--figures-only"]])
def test_a_folder_that_takes_no_files_is_refused_before_a_run(monkeypatch, tmp_path, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(statistics.Study, "run", lambda *_: pytest.fail("it began"))
    with pytest.raises(disback.Refusal, match="permission denied.*copy the repository to one that"):
        STUDY.main(["--quick", *more])
    assert not list(tmp_path.iterdir())
