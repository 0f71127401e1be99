"""The check of a machine, on this one."""

import math
import time
from concurrent.futures import Future

import pytest
import torch
from conftest import SMALL, refusal

import backtrack
import degrade
from imagenet64 import problem
from runtime import check
from sdxl import text


class Here:
    """A pool that does the work at once: a stage in this process must be in its first thread."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        future = Future()
        future.set_result(work(*args))
        return future


def here(file, *argv):
    """A stage in this process, where torch is imported already."""
    {"degrade.py": degrade, "backtrack.py": backtrack}[file].main([*map(str, argv)])
    return ""


@pytest.fixture(autouse=True)
def small(monkeypatch, small_digits, tmp_path):
    """Small networks whose teachers are soon trained, no classifier of digits, and one prompt."""
    (tmp_path / "prompts.txt").write_text("a dog")
    monkeypatch.setattr(text, "SHIPPED", tmp_path / "prompts.txt")
    monkeypatch.setattr(check, "SMALL", {"toy2d": SMALL, "imagenet64": ["--teacher-steps", "2"]})
    monkeypatch.setattr(problem, "Evaluation", lambda *_: None)


def test_the_table_of_a_machine_that_is_sound(capsys, monkeypatch, no_figures, cut_off):
    def stop(out, file, *argv, env):
        cut_off(2 * 5, backtrack.main, [*argv, "--out", out])  # it saves at the fourth iteration
        return ""

    monkeypatch.setattr(check, "ThreadPoolExecutor", Here)
    monkeypatch.setattr(check, "stage", here)
    monkeypatch.setattr(check, "stop", stop)
    with pytest.raises(SystemExit) as ended:
        check.main(["toy2d", "--steps", "8"])
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and torch.__version__ in first and head.startswith("problem")
    rows = [row for row in rows if row.startswith("toy2d")]
    assert len(rows) == (7 if torch.cuda.is_available() else 5)
    assert all(row.endswith(" ok") for row in rows)


def test_a_stage_that_fails_is_told_by_its_last_line_another_by_none_or_stopped(
        tmp_path, monkeypatch):
    """At its first checkpoint. All use this process's cache."""
    assert check.stage("-c", "raise SystemExit('a\\nout of luck')") == "out of luck"
    assert check.stage("-c", "pass") == ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISBACK_CACHE", "mine")  # of this folder, and the stages run in another
    asked = f"import runtime.errors as e; raise SystemExit(e.cache() != {str(tmp_path / 'mine')!r})"
    assert check.stage("-c", asked) == ""
    code = "import sys, time; raise SystemExit('out of luck')"
    assert check.stop(tmp_path, "-c", code, env={}) == "out of luck"
    code = "import sys, time; open(sys.argv[2] + '/state.pt', 'w'); time.sleep(60)"
    assert check.stop(tmp_path, "-c", code, env={}) == ""


def test_a_loss_that_is_not_the_cpus_and_a_stage_that_ends_badly_fall_short(capsys, monkeypatch):
    losses = check.losses

    def other(name, inputs, device, *rest, **flags):
        return losses(name, inputs, device) * (1.001 if device != "cpu" else 1)

    monkeypatch.setattr(check, "losses", other)
    monkeypatch.setattr(check, "stage", lambda *argv: "error: out of luck")
    with pytest.raises(SystemExit) as ended:
        check.main(["toy2d"])
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert "against a CPU's" in said and "0.001" in said and said.count("FAILED") == 3
    assert "FAILED error: out of luck" in said


@pytest.mark.parametrize("name", check.PROBLEMS)
def test_the_losses_do_not_vanish_and_see_an_input_that_changes(name):
    inputs = check.draw(name)
    found = check.losses(name, inputs, "cpu")
    assert found.isfinite().all() and (found > 1e-3).all()
    other = check.losses(name, (1.001 * inputs[0], *inputs[1:]), "cpu")
    assert check.apart(other, found) > 1e-5


def test_numbers_that_are_alike_are_not_apart_even_at_zero():
    zero, two, nan, inf = (torch.tensor([0.0, x]) for x in (0.0, 2.0, torch.nan, torch.inf))
    assert math.isnan(check.apart(inf, inf))
    assert check.apart(zero, zero) == 0 and check.apart(two * 1.5, two) == 0.5
    assert math.isinf(check.apart(two, zero)) and math.isnan(check.apart(nan, two))


@pytest.mark.parametrize("argv, cause", [(["toy3d"], "toy3d"), (["toy2d/", "x"], "problem x"),
                                         (["/"], "problem /"), (["--steps", "9/"], "9/"),
                                         (["--steps", "1"], "--steps")])
def test_a_mistake_is_refused(argv, cause):
    assert cause in refusal(check.main, argv)


def test_an_interrupt_waits_for_no_stage_and_calls_none_failed(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        while not (tmp_path / "began").exists():
            time.sleep(0.02)
        raise KeyboardInterrupt

    (tmp_path / "degrade.py").write_text(
        "import time; open('began', 'w').close(); time.sleep(60)")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "compare", interrupted)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        check.main(["toy2d", "sdxl"])
    assert time.perf_counter() - began < 30
    assert all(run.poll() is not None for run in check.STARTED)
    assert "FAILED" not in capsys.readouterr().out
