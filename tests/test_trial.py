"""Mistakes that were found by trying the commands with wrong eyes, one test a kind."""

import fcntl
import os
import shutil
import signal
import sys

import pytest
import torch
from conftest import BACKTRACK, DEGRADE
from test_mistakes import refused

import backtrack
import degrade
from imagenet64 import sample
from runtime import command, files, folder, plots
from sdxl import generate


def names(out):
    return sorted(str(file.relative_to(out)) for file in out.rglob("*"))


def test_a_refused_run_leaves_a_folder_as_it_was_found(capsys, monkeypatch, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for out in ("notes", "new/and/deep"):
        refused(capsys, monkeypatch, degrade.main, [
            "imagenet64", "--teacher", tmp_path / "none.safetensors", "--out", tmp_path / out])
        assert names(tmp_path) == ["notes", "notes/mine.txt"]


def test_a_finished_run_leaves_no_lock(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["degrade.py", "toy2d", "--out", str(tmp_path), *DEGRADE])
    command.run(degrade.main)
    assert {name.split("/")[0] for name in names(tmp_path)} == {"config.json", "path"}


def test_the_lock_is_on_the_file_that_the_next_process_will_find(monkeypatch, tmp_path):
    """A holder may end, and remove its file, between the opening of that file and its locking."""
    file, calls, lockf = tmp_path / ".disback.lock", [], fcntl.lockf

    def late(handle, how):
        lockf(handle, how)
        calls.append(handle)
        if len(calls) == 1:
            file.unlink()

    monkeypatch.setattr(fcntl, "lockf", late)
    folder.lock(tmp_path)
    assert len(calls) == 2 and os.path.samestat(os.fstat(calls[1]), os.stat(file))
    folder.leave()
    assert not file.exists()


def test_leaving_spares_a_lock_of_another_process(tmp_path):
    folder.lock(tmp_path)
    (tmp_path / ".disback.lock").unlink()
    (tmp_path / ".disback.lock").write_text("another's")
    folder.leave()
    assert names(tmp_path) == [".disback.lock"]


def test_sigterm_outside_the_loops_ends_in_a_line_and_lets_go_of_the_folder(
        capsys, monkeypatch, tmp_path):
    def main(argv):
        folder.lock(tmp_path / "run")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == 130 and capsys.readouterr().err.strip() == "error: interrupted"
    assert not names(tmp_path)


def test_a_tilde_of_nobody_makes_no_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, monkeypatch, degrade.main, ["toy2d", "--out", "~no-such-user/x"])
    assert "--out" in line and "~no-such-user/x" in line and not names(tmp_path)


@pytest.mark.parametrize("main, argv, first", [
    (sample.main, ["--classes", "3", "7", "runs/digits"], "RUN"),
    (generate.main, ["--seeds", "1", "2", "a cat"], "PROMPT")])
def test_what_must_come_before_a_list_of_numbers_is_said(capsys, monkeypatch, main, argv, first):
    line = refused(capsys, monkeypatch, main, argv)
    assert argv[0] in line and repr(argv[-1]) in line and f"{first} comes before" in line


OWN = ("path/07-mine.safetensors", "path/step-mine.safetensors", "snapshots/2024-best.safetensors",
       ".notes.unfinished", "figures/.x.unfinished/mine")


def test_overwriting_spares_names_that_only_resemble_a_runs(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    for name in OWN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    degrade.main(["toy2d", "--out", str(tmp_path), *DEGRADE, "--overwrite"])
    assert all((tmp_path / name).read_text() == "mine" for name in OWN)


def test_the_figures_do_without_a_users_own_snapshot(tmp_path):
    for name in ("0000005", "2024-best"):
        files.save_tensors(tmp_path / "snapshots" / f"{name}.safetensors", {
            "x0": torch.zeros(1, 2), "node": torch.tensor(0)})
    assert [step for step, _ in plots.read_snapshots(tmp_path)] == [5]


@pytest.mark.parametrize("place", ["figures", "path"])
def test_what_lies_beyond_a_link_is_not_replaced(
        recorded, capsys, monkeypatch, tmp_path, place):
    out, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(recorded, out)
    shutil.rmtree(out / place, ignore_errors=True)
    mine.mkdir()
    for name in ("path.png", "00.safetensors"):
        (mine / name).write_text("mine")
    (out / place).symlink_to(mine)
    line = refused(capsys, monkeypatch, degrade.main,
                   ["toy2d", "--out", out, *DEGRADE, "--overwrite"])
    assert "link" in line and {file.read_text() for file in mine.iterdir()} == {"mine"}


def test_a_link_to_a_runs_whole_folder_is_that_run(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    degrade.main(["toy2d", "--out", str(tmp_path / "link"), *DEGRADE, "--overwrite"])


def test_a_folder_in_a_files_place_is_refused_before_anything_goes(
        recorded, capsys, monkeypatch, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    (tmp_path / "metrics.json").mkdir()
    before = names(tmp_path)
    line = refused(capsys, monkeypatch, degrade.main,
                   ["toy2d", "--out", tmp_path, *DEGRADE, "--overwrite"])
    assert "metrics.json" in line and names(tmp_path) == before


@pytest.mark.parametrize("finished", ["student.safetensors", "metrics.json"])
def test_a_student_without_its_numbers_is_not_offered_for_overwriting(
        recorded, capsys, monkeypatch, tmp_path, finished):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    (tmp_path / finished).write_text("{}")
    for flags in ([], ["--resume"]):
        line = refused(capsys, monkeypatch, backtrack.main,
                       ["toy2d", "--out", tmp_path, *BACKTRACK, *flags])
        assert "overwrite" not in line
