"""What a GPU alone can show; skipped where there is none. runtime.check prints a table of it."""

import contextlib
import shutil

import pytest
import torch
from conftest import BACKTRACK, SMALL

import backtrack
import degrade
from runtime import check
from runtime.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
FLAGS = {"toy2d": SMALL, "imagenet64": ["--teacher-steps", "20"], "sdxl": []}


def reported(name, what, seen, most=None, said=""):
    assert not said and (most is None or seen <= most), (name, what, seen, said)


@pytest.mark.parametrize("name", check.PROBLEMS)
def test_losses_and_gradients_are_the_cpus_in_fp32_bf16_and_compiled(name):
    check.compare(name, reported)


@pytest.mark.parametrize("name", check.PROBLEMS)
def test_stages_run_stop_and_go_on_there_and_from_a_cpus_checkpoint(name):
    check.run_stages(name, 10, reported)


@contextlib.contextmanager
def no_waiting():
    """An operation for which the host waits for the GPU raises inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", check.PROBLEMS)
def test_the_host_waits_for_nothing_inside_an_iteration(tmp_path, monkeypatch, name, precision):
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device="cuda").item()

    def watched(steps):
        for step in steps:
            # The first makes handles and workspaces; the last is saved and logged.
            with no_waiting() if 1 < step < 8 else contextlib.nullcontext():
                yield step

    steps = Run.steps
    monkeypatch.setattr(Run, "steps", lambda run, total: watched(steps(run, total)))
    monkeypatch.chdir(tmp_path)
    common = [name, *FLAGS[name], "--batch", "8", "--steps", "8", "--log-every", "99",
              "--precision", precision, "--no-compile", "--out"]
    degrade.main([*common, "path", "--nodes", "1", "--spacing", "linear"])
    backtrack.main([*common, "run", "--save-every", "99", "--target", "teacher"])


def test_a_compiled_stage_waits_for_nothing_and_compiles_nothing_anew_at_a_switch(
        recorded, tmp_path, monkeypatch, no_figures):
    seen = []

    def watched(steps):
        for step in steps:
            yield step
            seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    steps = Run.steps
    monkeypatch.setattr(Run, "steps", lambda run, total: watched(steps(run, total)))
    shutil.copytree(recorded / "path", tmp_path / "path")
    backtrack.main(["toy2d", "--out", str(tmp_path), *BACKTRACK, "--compile"])
    assert seen[0] > 0 and seen[-1] == seen[0]
