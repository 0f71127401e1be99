"""What a user's mistake gets: one line with cause and remedy, status 2, nothing written or lost."""

import importlib
import math
import os
import re
import resource
import shutil
import signal
import sys

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, SMALL, refusal

import backtrack
import degrade
import disback
import runtime
from imagenet64 import sample
from runtime import command, files
from sdxl import generate
from toy2d import metrics


@pytest.mark.parametrize("words, cause", [
    (["toy3d"], "toy3d"), ([], "PROBLEM"), (["toy2d", "--preset", "square"], "square"),
    (["toy2d", "--presett", "ring"], "--presett"), (["toy2d", "--nodes", "ten"], "ten"),
    (["toy2d", "--lr-student", "1"], "--lr-student"),  # of the other stage
    (["toy2d", "--lr-degrade", "fast"], "fast"), (["toy2d", "--steps", "0"], "--steps"),
    (["toy2d", "--batch", "-3"], "batch"), (["toy2d", "--ema", "1"], "ema"),
    (["toy2d", "--spacing", "square"], "square"), (["toy2d", "--seed", "-1"], "--seed"),
    (["toy2d", "--seed", "9" * 30], "--seed"), (["toy2d", "--sigma-min", "30"], "--sigma-min"),
    *((["toy2d", "--lr-degrade", rate], "--lr-degrade") for rate in ("nan", "0", "inf")),
    (["toy2d", "--sigma-max", "1e300"], "--sigma-max"),  # no float32 holds it
    (["toy2d", "--distance", "1e-300"], "--distance"),  # which would be 0 in float32
    (["toy2d", "--distance", "1e17"], "--distance"),  # from where no noise is left in float32
    *((["toy2d", flag, value], flag) for value in ("1e30", "1e-30")  # nor has float32 their squares
      for flag in ("--start-sigma", "--sigma-data", "--lr-degrade", "--distance")),
    (["toy2d", "--save-every", "9" * 30], "--save-every"),
    (["imagenet64", "--start-sigma", "3.5e38"], "--start-sigma"),
    (["imagenet64", "--images", "imagenet"], "--images"),  # they are the preset's
    (["sdxl", "--guidance", "1e39"], "--guidance"),
    (["toy2d", "--steps", "20", "--nodes", "21"],
     "--nodes must be at most 20, the --steps")])
def test_words_that_make_no_sense_are_refused_by_name(refused, tmp_path, words, cause):
    out = tmp_path / "run"
    argv = [*words, "--out", out, *(SMALL if "toy2d" in words else [])]
    assert cause in refused(degrade.main, argv)
    assert not out.exists()


@pytest.mark.parametrize("main, words, cause", [
    *((backtrack.main, ["toy2d", *BACKTRACK, flag, ""], "empty")
      for flag in ("--out", "--path", "--compare")),
    (backtrack.main, ["toy2d", "--lr-degrade", "1"], "--lr-degrade"),
    (backtrack.main, ["toy2d", *BACKTRACK], "degrade.py"),  # there is no path
    (backtrack.main, ["toy2d", *BACKTRACK, "--path", "x", "--target", "teacher"],
     "--path x is of no use"),
    (degrade.main, ["sdxl", "--preset", "full", "--model", ""], "--model: must not be empty"),
    (degrade.main, ["toy2d", "--out", "~no-such-user/x"], "~no-such-user/x is in no user's home"),
    (degrade.main, ["--out", "toy2d", "imagenet64"],  # a flag's value is no problem
     "name the problem first: degrade.py imagenet64"),
    (sample.main, ["--classes", "3", "7", "runs/digits"], "'runs/digits'"),
    (sample.main, [__file__], f"{__file__} is a file: name the folder of its run"),
    (generate.main, ["--seeds", "1", "2", "a cat"], "'a cat'")])
def test_nor_do_these_make_a_folder(refused, monkeypatch, tmp_path, main, words, cause):
    monkeypatch.chdir(tmp_path)
    assert cause in refused(main, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, cause", [
    (["--preset", "grid"], "preset"), (["--seed", "5"], "seed"), (["--width", "8"], "width"),
    (["--distance", "3"], "distance"), (["--start", "teacher"], "start")])
def test_a_path_of_another_run_is_refused_naming_what_differs(
        recorded, refused, tmp_path, flags, cause):
    argv = ["toy2d", "--out", tmp_path / "run", "--path", recorded / "path", *BACKTRACK, *flags]
    assert cause in refused(backtrack.main, argv)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_path_is_kept_unless_overwritten(stage1, refused):
    out, argv = stage1
    before = (out / "path" / "path.json").read_bytes()
    assert "--overwrite" in refused(degrade.main, argv)
    assert (out / "path" / "path.json").read_bytes() == before


def test_resuming_a_broken_checkpoint_or_none_or_along_another_path_is_refused(
        finished, refused):
    out, back = finished
    state = out / "state.pt"
    whole = state.read_bytes()
    for broken in (whole[:-500], b"", b"not a checkpoint"):
        state.write_bytes(broken)
        line = refused(backtrack.main, [*back, "--resume"])
        assert "state.pt" in line and "torch.save" not in line  # which torch would advise
    state.unlink()
    assert "state.pt" in refused(backtrack.main, [*back, "--resume"])
    torch.save({"step": 3}, state)
    assert "state.pt" in refused(backtrack.main, [*back, "--resume"])
    state.write_bytes(whole)
    path = out / "path" / "path.json"
    path.write_text(path.read_text() + "\n")  # another path than the run's, by the same flags
    line = refused(backtrack.main, [*back, "--resume"])
    assert "recorded again" in line and "--path" not in line


def test_too_large_a_batch_costs_a_line_and_no_old_run(stage1, refused):
    out, argv = stage1
    line = refused(degrade.main, [*argv, "--batch", "1" + "0" * 12, "--overwrite"])
    assert "allocate" in line and len(disback.DegradationPath(out / "path")) == 5


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")])
def test_too_little_memory_is_never_blamed_on_a_file(refused, error):
    def main(argv):
        with files.blame("state.pt is broken: remove it"):
            raise error

    line = refused(main, [])
    assert "memory" in line and "lower --batch" in line and "state.pt" not in line


def test_rates_of_decay_may_be_zero():
    """Also those that start above zero, and SDXL's least timestep."""
    from sdxl import problem
    from toy2d.problem import Config

    problem.Config(weight_decay=0.0, t_min=0)
    Config(ema=0.0, beta1=0.0, beta2=0.0, weight_decay=0.0)
    assert re.search("--lr-fake must be above .* below .*, not 0.0", refusal(Config, lr_fake=0.0))


@pytest.mark.parametrize("wrong", [
    {"batch": 3.5}, {"batch": True}, {"batch": "8"}, {"ema": "0.5"}, {"ema": False},
    {"lr_fake": None}, {"lr_fake": math.nan}, {"nodes": [1]}])
def test_numbers_of_a_file_are_numbers_of_their_kind(wrong):
    """A run's config.json is read into a Config."""
    from toy2d.problem import Config

    (name, value), = wrong.items()
    said = refusal(Config, **wrong)
    assert ("at least 1 and" in said) == (name in ("batch", "nodes"))
    assert f"--{name.replace('_', '-')} must be " in said and repr(value) in said


@pytest.mark.parametrize("text", ['{"x": NaN}', '{"x": -Infinity}', "[1]", '"x"', "\xff", "{"])
def test_a_json_file_that_is_none_is_refused_with_the_remedy(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    said = refusal(files.load_json, tmp_path / "x.json", "write it again")
    assert "x.json cannot be read: write it again" in said


def test_an_argument_that_is_not_utf_8_is_refused_and_a_cache(
        refused, monkeypatch, tmp_path):
    word = os.fsdecode(b"caf\xe9")
    assert "not UTF-8" in refused(degrade.main, ["toy2d", "--out", word])
    assert "caf" in refused(degrade.main, ["toy2d", "--preset", "caf\u00e9"])
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path / word))
    assert "DISBACK_CACHE or HOME is not UTF-8: '" in refused(degrade.main, ["toy2d"])


@pytest.mark.parametrize("broken", [b"", b"cut", {"x0": torch.zeros(2, 2)}, {
    "x0": torch.full((2, 2), torch.nan), "node": torch.tensor(0)}, {
    "x0": torch.zeros(2, 2), "node": torch.tensor(-2)}, {
    "x0": torch.zeros(2, 2).double(), "node": torch.tensor(3)}])
def test_a_broken_snapshot_is_named_when_the_figures_are_drawn(tmp_path, broken):
    from runtime import plots

    good = {"x0": torch.zeros(2, 2), "node": torch.tensor(3)}
    for name in ("0000000", "0000005", "0000009", "2024-best"):  # the last is a user's own
        files.save_tensors(tmp_path / "snapshots" / f"{name}.safetensors", good)
    assert [(step, int(kept["node"])) for step, kept in plots.read_snapshots(tmp_path)] == [
        (0, 3), (5, 3), (9, 3)]
    for name in ("0000000", "0000009"):  # the first is not what the others must be like
        file = tmp_path / "snapshots" / f"{name}.safetensors"
        file.write_bytes(broken) if isinstance(broken, bytes) else files.save_tensors(file, broken)
        assert f"{file} is broken: remove it" in refusal(plots.read_snapshots, tmp_path)
        files.save_tensors(file, good)
    shutil.rmtree(tmp_path / "snapshots")
    assert "none left" in refusal(plots.read_snapshots, tmp_path)


def test_an_evaluation_that_returns_no_number_is_not_blamed_on_the_log(monkeypatch, tmp_path):
    """As that of somebody's own problem may; it is a defect, and no mistake of a user's."""
    monkeypatch.setattr(metrics.Evaluation, "__call__", lambda *_: {"swd": torch.tensor(1.0)})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        backtrack.main(["toy2d", *BACKTRACK, "--target", "teacher", "--out", str(tmp_path)])


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise RuntimeError("a defect")

    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(RuntimeError, match="a defect"):
        command.run(broken)


def test_a_compiler_that_fails_is_told_in_its_own_words(refused):
    from torch._inductor.exc import CppCompileError

    for output, told in (("fatal error: no space", "fatal error: no space"),
                         ("", "C++ compile error")):
        def broken(argv, output=output):
            raise CppCompileError(["g++", *["-option"] * 99], output)

        assert f"--no-compile runs without; {told}" in refused(broken, [])


def test_a_stage_1_whose_weights_overflow_records_no_path(refused, tmp_path):
    argv = ["toy2d", "--out", tmp_path, *DEGRADE, "--lr-degrade", "1e17", "--log-every", "99"]
    said = refused(degrade.main, argv)
    assert re.search("(loss|position) is (inf|nan) at step 20,", said)  # by processor
    assert not (tmp_path / "path" / "path.json").exists()


def test_a_run_that_diverges_stops_with_its_step_and_node_and_keeps_the_last_checkpoint(
        stage1, refused, no_figures, before_updates):
    (out, _), count = stage1, 0

    def poison(optimizer):
        nonlocal count
        count += 1
        if count > 2 * 9:
            optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)

    before_updates(poison)
    line = refused(backtrack.main, ["toy2d", "--out", out, *BACKTRACK])
    assert "step 10" in line and "node 0" in line and str(out) in line
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 8
    assert all(t.isfinite().all() for t in state["student"].values())


@pytest.mark.parametrize("limit", [50_000, 100_000])
@pytest.mark.parametrize("save", [
    lambda file: files.save_tensors(file, {"x": torch.zeros(100_000)}),
    lambda file: files.save_json(file, [*range(100_000)]),
    lambda file: files.atomically(file, lambda f: torch.save(torch.zeros(100_000), f))])
def test_a_disk_that_fills_while_saving_leaves_the_old_file(refused, tmp_path, save, limit):
    """A limit on the size of files stands for the full disk: writing beyond it fails alike."""
    file = tmp_path / "kept"
    file.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        line = refused(lambda argv: save(file), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith("error: cannot write") and "File too large: make room" in line
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("error, said", [
    (KeyboardInterrupt(), "error: interrupted"), (ImportError("peft is old"), "error: peft is old"),
    (ModuleNotFoundError("No module named 'x'"),
     "error: No module named 'x': pip install -r requirements.txt")])
def test_an_interrupt_while_the_libraries_load_is_a_line(monkeypatch, capsys, error, said):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    before = sys.excepthook
    importlib.reload(runtime)
    assert sys.excepthook is before
    monkeypatch.setattr(sys, "argv", ["-m"])
    importlib.reload(runtime)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err.strip() == said and ended == [2] * isinstance(error, ImportError)
    sys.excepthook(ValueError, ValueError("a fault"), None)
    assert "ValueError: a fault" in capsys.readouterr().err
    command.run(lambda argv: None)  # they are loaded
    assert sys.excepthook is sys.__excepthook__
