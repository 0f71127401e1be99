"""A run that is stopped anywhere, politely or not, goes on to the same bits."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, TINY, edit, make, read, refusal, same
from processes import Started

import backtrack
import degrade
import disback
from runtime import files, records, signals
from runtime.run import Run
from toy2d import problem as toy

STAGE1 = ["toy2d", *DEGRADE, "--save-every", "6"]


def same_path(one, other):
    """Node for node the same bits, recorded at the same steps and at the same cost. A run knows its
    path by the hash of path.json: one that was lost can be recorded again."""
    about = [(out / "path" / "path.json").read_text() for out in (one, other)]
    names = [sorted(file.name for file in (out / "path").iterdir()) for out in (one, other)]
    return about[0] == about[1] and names[0] == names[1] and all(
        (one / "path" / name).read_bytes() == (other / "path" / name).read_bytes()
        for name in names[0] if name.endswith(".safetensors"))


def counting(patch, owner, name, calls):
    """Let each call of owner.name be counted in `calls`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **rest: (
        calls.update([name]), original(*args, **rest))[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A stage 1 that nothing stopped, and how often it replaced and removed a file."""
    out, calls = tmp_path_factory.mktemp("whole"), Counter()
    make(toy, **TINY)  # a teacher in the cache
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "unlink")):
            counting(patch, owner, name, calls)
        degrade.main([*STAGE1, "--out", str(out)])
    return out, calls


def interrupt_at(monkeypatch, owner, name, call):
    """Make the `call`-th call of owner.name, counted from 1, end the run as SIGKILL would."""
    original, calls = getattr(owner, name), 0

    def counted(*args, **keywords):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **keywords)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("owner, name, call", [
    (disback, "update_score_model", 8),  # after the first checkpoint
    (disback, "update_score_model", 15),
    (Run, "save", 2),
    (Run, "save", 4),
    (files, "save_tensors", 7),
    (os, "replace", 13),
    (os, "replace", -3),  # in the middle of numbering the nodes
    (os, "replace", -1),  # path.json
    (Path, "unlink", -1)])
def test_stage_1_resumes_to_the_same_bits_wherever_it_was_cut_off(
        whole, tmp_path, monkeypatch, owner, name, call):
    whole, calls = whole
    if call < 0:  # from the end of a whole run
        call += calls[name] + 1
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            degrade.main([*STAGE1, "--out", str(out)])
    with contextlib.suppress(SystemExit):  # it was recorded already
        degrade.main([*STAGE1, "--out", str(out), "--resume"])
    assert same_path(whole, out)
    log = read(out / "path" / "log.jsonl")
    for name in ("step", "seconds"):
        assert [line[name] for line in log] == sorted(line[name] for line in log)


def test_a_finished_stage_1_is_left_as_it_is_by_resume(whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    argv = [*STAGE1, "--out", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit) as ended:
        degrade.main(argv)
    assert not ended.value.code and "recorded already" in capsys.readouterr().out
    for flag, value in (("--distance", "12"), ("--lr-degrade", "0.5"), ("--batch", "128")):
        assert re.search(f"{flag} .*, not {value}", refusal(degrade.main, [*argv, flag, value]))
    assert "not allowed with argument" in refusal(degrade.main, [*argv, "--overwrite"])
    assert same_path(whole[0], tmp_path)


def test_stage_1_refuses_the_checkpoint_of_other_flags_and_one_that_is_missing(tmp_path, cut_off):
    cut_off(15, degrade.main, [*STAGE1, "--out", tmp_path])
    state = tmp_path / "path" / "state.pt"
    argv = [*STAGE1, "--out", str(tmp_path), "--resume"]
    assert "--lr-degrade 0.002, not 0.5" in refusal(degrade.main, [*argv, "--lr-degrade", "0.5"])
    state.unlink()
    assert str(state) in refusal(degrade.main, argv)


def test_what_a_kill_left_half_written_goes_when_the_run_goes_on(finished):
    out, argv = finished
    torn = [out / ".state.pt.a1b2c3d4.unfinished" / "state.pt",
            out / "snapshots" / ".0000008.safetensors.c3_d4e5f.unfinished" / ".tmpA1b2C3",
            out / "figures" / ".path.png.c3_d4e5f.unfinished" / "path.png",
            out / ".config.json.a1b2c3d4.unfinished" / "config.json"]
    for place in ("figures", "other", ".fid-9x1.partial.safetensors.a1b2c3d4.unfinished"):
        (out / place).mkdir()  # the last, of a program that may be under way
    for file in (out / ".notes.bak.2024", out / "other" / ".x.pt.1.unfinished"):
        file.write_bytes(b"half")

    def names():
        return sorted(file for file in out.rglob("*") if file.name != ".disback.lock")

    kept = names()
    with pytest.raises(disback.Refusal):
        backtrack.main([*argv, "--resume", "--lr-fake", "0.5"])
    assert names() == kept
    for flag in ("--resume", "--overwrite"):
        for file in torn:
            file.parent.mkdir()
            file.write_bytes(b"half")
        backtrack.main([*argv, flag])
        assert names() == kept


def test_what_was_logged_and_kept_after_the_checkpoint_goes(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 8')
    (tmp_path / "snapshots").mkdir()
    for name in ("0000004", "0000005", "9-mine"):
        (tmp_path / "snapshots" / f"{name}.safetensors").write_bytes(b"")
    records.cut_log(tmp_path / "log.jsonl", 4)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])
    kept = sorted(file.stem for file in (tmp_path / "snapshots").iterdir())
    assert kept == ["0000004", "9-mine"]


def test_a_finished_run_keeps_the_peak_of_its_training(finished):
    out, argv = finished
    edit(out / "metrics.json", peak_memory_bytes=2**60)
    backtrack.main([*argv, "--resume"])
    assert read(out / "metrics.json")["peak_memory_bytes"] == 2**60
    backtrack.main([*argv, "--overwrite"])
    assert read(out / "metrics.json")["peak_memory_bytes"] < 2**60
    edit(out / "metrics.json", peak_memory_bytes="much")
    assert "peak_memory_bytes" in refusal(backtrack.main, [*argv, "--resume"])


@pytest.fixture
def checkpointed(tmp_path):
    """A run of a tiny network; its state can be saved and restored."""
    net, made = torch.nn.Linear(2, 2), types.SimpleNamespace(config=toy.Config(), about={})
    args = types.SimpleNamespace(out=tmp_path, resume=True)
    return Run("backtrack", args, made, {"net": net}, {"net": torch.optim.AdamW(net.parameters())},
               {})


def test_what_is_not_finite_never_replaces_a_checkpoint(checkpointed):
    checkpointed.save()
    kept = checkpointed.state.read_bytes()
    with torch.no_grad():
        checkpointed.nets["net"].bias[0] = math.nan
    checkpointed.step = 2
    assert "weight of the net is not finite at step 2" in refusal(checkpointed.save)
    assert checkpointed.state.read_bytes() == kept


def test_a_checkpoint_of_a_cpu_leaves_a_gpus_random_numbers_alone(checkpointed, monkeypatch):
    checkpointed.save()
    gpu, found = torch.tensor([1, 2], dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_rng_state", found.append)
    checkpointed.restore()
    assert not found
    checkpointed.save()
    checkpointed.restore()
    assert torch.equal(*found, gpu)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
        recorded, completed, tmp_path, no_figures, number):
    argv = ["toy2d", *BACKTRACK, "--out", str(tmp_path)]
    shutil.copytree(recorded / "path", tmp_path / "path")
    said, code = Started(f"""
import os
import backtrack, disback
update, calls = disback.update_score_model, []
def signalled(*args):
    calls.append(1)
    if len(calls) == 13:
        os.kill(os.getpid(), {int(number)})
    return update(*args)
disback.update_score_model = signalled
backtrack.main({argv!r})
""").ended()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 13 and code == 1
    assert f"stopped by {number.name} after step 13: --resume" in said
    assert "Traceback" not in said
    backtrack.main([*argv, "--resume"])
    assert same(tmp_path, completed)
    numbers = [[line | {"seconds": 0} for line in read(out / "log.jsonl")]
               for out in (tmp_path, completed)]
    assert numbers[0] == numbers[1]  # the means of the interval in which it was stopped, too


def test_outside_the_loop_signals_do_what_they_did_and_an_ignored_one_stops_none():
    def mine(*_):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.heeding_signals() as came:
            signal.raise_signal(signal.SIGINT)
            assert not came
            signal.raise_signal(signal.SIGTERM)
            assert came
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_signal_is_heeded_where_nobody_listens_to_what_is_said(monkeypatch):
    """Standard error may be a pipe whose reader was killed first."""
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError))
    with signals.heeding_signals() as came:
        signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]
