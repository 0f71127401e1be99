"""Mistakes that were found by trying the commands with wrong eyes, one test a kind."""

import ast
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import runpy
import shutil
import signal
import stat
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm
from conftest import BACKTRACK, DEGRADE, edit, read, refusal
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

import backtrack
import degrade
import disback
from imagenet64 import download, fid, sample
from imagenet64 import problem as digits
from runtime import cli, command, errors, files, folder, pictures, plots, ranks, records
from runtime.run import Run
from sdxl import figures, generate, layout, text, tiny
from toy2d import problem
from toy2d.gallery import __main__ as gallery


def names(out):
    return sorted(str(file.relative_to(out)) for file in out.rglob("*"))


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


@pytest.mark.parametrize("place", ["figures", "path"])
def test_what_lies_beyond_a_link_is_not_replaced(refused, stage1, tmp_path, place):
    (out, argv), mine = stage1, tmp_path / "mine"
    shutil.rmtree(out / place, ignore_errors=True)
    mine.mkdir()
    for name in ("path.png", "00.safetensors"):
        (mine / name).write_text("mine")
    (out / place).symlink_to(mine)
    assert "link" in refused(degrade.main, [*argv, "--overwrite"])
    assert {file.read_text() for file in mine.iterdir()} == {"mine"}


def test_a_link_to_a_runs_whole_folder_is_that_run(stage1, tmp_path):
    (tmp_path / "link").symlink_to(stage1[0])
    degrade.main(["toy2d", "--out", str(tmp_path / "link"), *DEGRADE, "--overwrite"])


def test_a_folder_in_a_files_place_is_refused_before_anything_goes(refused, stage1):
    out, argv = stage1
    (out / "metrics.json").mkdir()
    (out / "student.safetensors").write_text("a student")
    before = names(out)
    assert "metrics.json" in refused(degrade.main, [*argv, "--overwrite"])
    assert names(out) == before


@pytest.fixture
def finished(recorded, tmp_path):
    """As much of a finished run as --compare reads."""
    out = tmp_path / "other"
    line = {"step": 2, "node": 0, "mismatch": 1.0, "network_evals": 1, "swd": 1.0}
    files.save_json(out / "metrics.json", {"problem": "toy2d", "data": "ring", "method": "vsd",
                                           "steps": 2,
                                           "network_evals": {"stage1": 0, "stage2": 1}})
    (out / "log.jsonl").write_text(json.dumps(line) + "\n")
    for step in (0, 2):
        files.save_tensors(out / "snapshots" / f"{step:07d}.safetensors", {
            "x0": torch.zeros(4, 2), "node": torch.tensor(0)})
    return out


@pytest.fixture
def compared(finished, recorded, refused, no_training, tmp_path):
    """Whether it is refused to compare with that run, in which line, before anything is made."""
    records.check_finished(finished, "toy2d", problem.PRESETS["ring"], tmp_path)  # as it is

    def run():
        line = refused(backtrack.main, ["toy2d", "--path", recorded / "path", *BACKTRACK, "--out",
                                        tmp_path / "new", "--compare", finished])
        assert not (tmp_path / "new").exists()
        return line

    return run


@pytest.mark.parametrize("change, cause", [
    ({"method": "other"}, "method"), ({"method": None}, "method"), ({"steps": 0}, "steps"),
    ({"steps": "many"}, "steps"), ({"problem": "sdxl"}, "sdxl"),
    ({"data": "grid"}, "grid"), ({"data": None}, "takes a run with ring"),
    ({"network_evals": None}, "finish that run first"),
    ({"network_evals": {"stage1": -1, "stage2": 1}}, "stage1"),
    ({"network_evals": {"stage1": 0, "stage2": 10**400}}, "stage2")])
def test_numbers_that_the_comparison_needs_are_looked_at_first(finished, compared, change, cause):
    edit(finished / "metrics.json", **change)
    line = compared()
    assert str(finished) in line and cause in line
    (finished / "metrics.json").unlink()
    assert str(finished) in compared()


@pytest.mark.parametrize("change", [{"network_evals": None}, {"swd": "many"}])
def test_so_are_the_lines_of_its_log(finished, compared, change):
    file = finished / "log.jsonl"
    file.write_text(json.dumps(read(file)[0] | change) + "\n")
    line = compared()
    assert next(iter(change)) in line and "log.jsonl" in line
    file.write_text("")
    assert "log.jsonl has no lines" in compared()


@pytest.mark.parametrize("last", [1, 3])  # it was cut; the run was being prolonged
def test_a_run_whose_log_ends_elsewhere_is_not_finished(finished, compared, last):
    file = finished / "log.jsonl"
    file.write_text(json.dumps(read(file)[0] | {"step": last}) + "\n")
    assert f"{finished} cannot be compared with: finish that run first" in compared()


@pytest.mark.parametrize("broken", ["none", "cut", "shape", "names", "nan node"])
def test_so_are_its_snapshots(finished, compared, broken):
    file = finished / "snapshots" / "0000002.safetensors"
    if broken == "none":
        shutil.rmtree(file.parent)
    elif broken == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:
        files.save_tensors(file, {"x0": torch.zeros(4, 3 if broken == "shape" else 2),
                                  **({"bias": torch.zeros(2)} if broken == "names" else {}),
                                  "node": torch.tensor(float("nan") if "nan" in broken else 0)})
    assert "snapshots" in compared()


@pytest.mark.parametrize("place", ["figures", "snapshots", "path"])
def test_a_file_in_a_folders_place_is_refused_before_any_training(
        refused, no_training, tmp_path, place):
    (tmp_path / place).write_text("mine")
    line = refused(degrade.main, ["toy2d", "--out", tmp_path, *DEGRADE])
    assert str(tmp_path / place) in line and "--out" in line


def test_what_cannot_be_written_is_not_computed(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "source", lambda *_: pytest.fail("read"))
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file} is no folder: name another --to" in refused(
        sample.main, ["run", "--to", file / "x.npz"])
    mine = file.rename(tmp_path / "mine.png")
    assert f"{mine} is in the way: name another --to" in refused(sample.main, ["run", "--to", mine])
    mine.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(errors.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 64 - 1))
        line = refused(sample.main, ["teacher", "--images", 10, "--to", tmp_path / "x.npz"])
        assert "MB of free space: make room, or name another --to" in line  # of 8 x 8, a byte each
    monkeypatch.setattr(os, "access", lambda place, mode: pathlib.Path(place) != tmp_path)
    assert f"denied: {tmp_path}: " in refused(fid.main, [tmp_path])
    for main, words in ((generate.main, ["cat"]), (gallery.main, ["vsd"])):
        line = refused(main, [*words, "--out", tmp_path / "new"])
        assert f"denied: {tmp_path}: change its mode, or name another --out" in line
    assert not list(tmp_path.iterdir())


def test_a_killed_download_goes_at_the_next(monkeypatch, tmp_path):
    file, seen = tmp_path / "teacher.pkl", []
    left, other = (tmp_path / f".{name}.a1b2c3d4.unfinished" for name in (
        "teacher.pkl", "inception.pt"))
    for place in (left, other):
        place.mkdir()
        (place / "x.partial").write_bytes(b"half")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, to: (
        seen.append(left.exists()), open(to, "wb").close()))
    download.fetch("http://x", file, lambda _: None)
    assert seen == [False] and other.exists() and file.exists()


def test_the_tiny_pipeline_in_the_cache_has_the_modes_that_umask_asks_for(tmp_path):
    made = tiny.folder(tmp_path)
    modes = {stat.S_IMODE(file.stat().st_mode) | 0o111 for file in (made, *made.rglob("*"))}
    assert modes == {0o777 & ~files.UMASK | 0o111} and [*tmp_path.iterdir()] == [made]


def test_without_a_home_the_cache_must_be_named(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)
    monkeypatch.delenv("DISBACK_CACHE")
    assert "DISBACK_CACHE" in refusal(files.cached, "x")


def test_a_cache_that_takes_no_files_is_refused_before_a_teacher_is_trained(
        refused, monkeypatch, tmp_path):
    monkeypatch.setattr("toy2d.problem.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path / "file"))
    line = refused(degrade.main, ["toy2d", "--out", tmp_path / "r", *DEGRADE])
    assert str(tmp_path / "file") in line and "DISBACK_CACHE" in line


@pytest.mark.parametrize("read", [
    lambda file: files.load_net(file, torch.nn.Linear(1, 1)),
    lambda file: folder.read_path(file.parent, {})])
def test_a_file_that_must_not_be_read_is_not_called_missing(recorded, monkeypatch, read):
    file, opened = recorded / "path" / "01.safetensors", pathlib.Path.open

    def shut(path, *mode):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode)

    monkeypatch.setattr(pathlib.Path, "open", shut)
    with pytest.raises((disback.Refusal, PermissionError), match=f"(?i)permission denied.*{file}"):
        read(file)


def test_a_number_that_a_log_lacks_is_a_gap_in_the_figure(finished, tmp_path):
    file = finished / "log.jsonl"
    file.write_text(file.read_text() + '{"step": 2}\n')
    for draw in (lambda png: plots.draw_convergence(png, [finished], "other", "", 1.0, ""),
                 lambda png: figures.draw_mismatch(png, [finished])):
        draw(tmp_path / "x.png")
        (tmp_path / "x.png").unlink()


@pytest.mark.parametrize("in_steps, at, switched", [(True, 1, 2), (False, 3 + 2, 3 + 2 * 2)])
def test_curves_stand_at_steps_or_at_the_evaluations_of_both_stages(
        finished, in_steps, at, switched):
    log = finished / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 2', '"step": 1'))
    files.save_json(finished / "metrics.json", {
        "method": "disback", "steps": 10, "network_evals": {"stage1": 3e6, "stage2": 20e6}})
    files.save_tensors(finished / "snapshots" / "0000000.safetensors", {
        "x0": torch.zeros(4, 2), "node": torch.tensor(1)})
    axis = plots.plt.figure().subplots()
    plots.curves({"swd": axis}, [finished], in_steps)
    curve, dotted = axis.lines
    assert (*curve.get_xdata(), *curve.get_ydata()) == (at, 1.0)
    assert dotted.get_xdata()[0] == switched


def test_a_run_is_not_compared_with_itself_under_another_name(finished, tmp_path):
    (tmp_path / "link").symlink_to(finished)
    for out in (finished, tmp_path / "link"):
        assert "is this run itself: name another" in refusal(
            records.check_finished, finished, "toy2d", problem.PRESETS["ring"], out)


def test_settings_by_which_a_compared_run_differs_are_told_once(finished, capsys, monkeypatch,
                                                                tmp_path):
    ring = problem.PRESETS["ring"]
    records.check_finished(finished, "toy2d", ring, tmp_path)  # which has no config.json
    about = dataclasses.asdict(ring) | {"ema": 0.0, "lr_fake": 1e-3, "log_every": 3, "nodes": 7}
    about |= {"target": "teacher", "interval": 99, "switch": "adaptive"}  # of no use to it
    files.save_json(finished / "config.json", {"backtrack": about, "degrade": {}})
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        records.check_finished(finished, "toy2d", ring, tmp_path)
    assert capsys.readouterr().out == (
        "note: the compared run was made with --lr-fake 0.001, --ema 0.0, this one is not\n")
    files.save_json(finished / "config.json", {
        "backtrack": about | {"target": "path", "data": ""}})
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    records.check_finished(finished, "toy2d", ring, tmp_path)
    said = capsys.readouterr().out
    assert "--interval 99, --switch adaptive" in said and "--data none" in said


@pytest.mark.parametrize("methods, called", [
    ([("disback", "degraded"), ("vsd", "teacher")], ["DisBack", "VSD"]),
    ([("vsd", "degraded"), ("vsd", "teacher")], ["VSD, degraded fake", "VSD"]),
    ([("disback", "degraded"), ("disback", "teacher")],
     ["DisBack", "DisBack, fake from the teacher"]),
    ([("disback", "degraded")] * 2, ["DisBack (run0)", "DisBack (run1)"])])
def test_two_runs_in_a_figure_are_told_apart(tmp_path, methods, called):
    runs = [tmp_path / f"run{i}" for i in range(2)]
    for run, (method, fake_init) in zip(runs, methods):
        run.mkdir()
        files.save_json(run / "metrics.json", {"method": method, "fake_init": fake_init})
    assert plots.names(runs) == called


def test_two_runs_of_one_name_are_told_apart_by_what_is_above(tmp_path):
    runs = [tmp_path / "seed0" / "toy2d", tmp_path / "seed1" / "toy2d", tmp_path]
    for run in runs:
        files.save_json(run / "metrics.json", {"method": "vsd"})
    assert plots.names(runs[:2]) == ["VSD (seed0/toy2d)", "VSD (seed1/toy2d)"]
    assert plots.names(runs[1:]) == ["VSD (seed1/toy2d)", f"VSD ({tmp_path.name})"]


@pytest.mark.parametrize("line", ['{"step": NaN}', "[1]", '{"step": "1"}', '{"step": -1}',
                                  '{"step": 1, "swd": "a"}', '{"swd": 1}'])
def test_a_line_of_the_log_that_cannot_be_is_refused(finished, line):
    (finished / "log.jsonl").write_text(line + "\n")
    assert "log.jsonl is broken: remove the lines" in refusal(records.read_log, finished)


@pytest.mark.parametrize("stage", ["degrade", "backtrack"])
def test_too_large_a_network_is_not_blamed_on_the_batch_alone(capsys, monkeypatch, tmp_path, stage):
    monkeypatch.setattr(sys, "argv", [
        "stage.py", "toy2d", "--width", str(2**40 - 1), "--out", str(tmp_path / "run"),
        *["--target", "teacher"][:2 * (stage == "backtrack")]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(stage, run_name="__main__")
    assert ended.value.code == 2 and "the network's size" in capsys.readouterr().err


@pytest.mark.parametrize("main, words", [
    (degrade.main, ["toy2d", "--depth", "1000"]),
    (degrade.main, ["toy2d", "--steps", "99999", "--nodes", "10000"]),
    (sample.main, ["teacher", "--steps", "9" * 20]), (fid.main, ["teacher", "--images", "9" * 20]),
    (generate.main, ["a", "--batch", "9" * 20]),
    (gallery.main, ["all", "--seeds", "1000"])])
def test_sizes_that_no_machine_has_are_refused_by_name(refused, main, words):
    assert words[-2] in refused(main, words)


@pytest.mark.parametrize("main, words", [
    (degrade.main, ["sdxl", "--prompts"]), (degrade.main, ["imagenet64", "--teacher"]),
    (generate.main, ["a", "--student"]), (generate.main, ["a", "--base"])])
def test_a_home_of_nobody_is_named(refused, main, words):
    line = refused(main, [*words, "~nobody-of-that-name/x"])
    assert words[-1] in line and "in no user's home" in line


@pytest.mark.parametrize("error, words", [
    (PermissionError(13, "Permission denied", "a/b"), "permission denied: a/b: change its mode"),
    (PermissionError(13, "", "a/.b.x1y2z3w4.unfinished"), "permission denied: a: change its mode"),
    (PermissionError(13, "", "a/.b.x1y2z3w4.unfinished/b"), "permission denied: a: change its"),
    (FileNotFoundError(f"No such file or directory: {__file__}"),  # safetensors calls it so
     f"permission denied: {__file__}: change its mode"),
    (ModuleNotFoundError("No module named 'x'"), "No module named 'x': pip install -r req"),
    (ImportError("peft 0.17.1 is too old: pip"), "peft 0.17.1 is too old: pip"),
    (OSError(28, "No space left on device", "a"), "a: No space left on device: make room"),
    (OSError(122, "Disk quota exceeded", "a"), "a: Disk quota exceeded: make room, or name another "
     "place"),
    (PermissionError(13, "", "/c/a"),
     "permission denied: /c/a: change its mode, if it is yours, or name another cache by DISBACK_"),
    (OSError(28, "No space left", "/c/a"), "/c/a: No space left: make room, or name another cache"),
    (PermissionError(13, "", "/c"),
     "permission denied: /c: change its mode, if it is yours, or name another cache"),
    (OSError(28, "No space left", "/b/c/a"), "/b/c/a: No space left: make room, or name another p"),
    (OSError(28, "No space left"), "a file, maybe a temporary one, whose folder TMPDIR names: No"),
    (NotADirectoryError(20, "Not a directory", "a"), "a: Not a directory: move what is there"),
    (OSError("the host is gone"), "the host is gone"),
    (disback.Refusal("no space (os error 28): make room"), "no space (os error 28): make room\n")])
def test_what_the_system_refuses_is_said_with_what_helps(refused, monkeypatch, error, words):
    def main(argv):
        raise error

    monkeypatch.setenv("DISBACK_CACHE", "/c")
    assert f"error: {words}" in refused(main, []) + "\n"


@pytest.mark.parametrize("argv", [["toy2d"], ["imagenet64"], ["sdxl"]])
def test_a_full_cache_is_told_before_a_teacher_is_trained_for_it(
        refused, monkeypatch, tmp_path, argv):
    """And a full run's folder before the cache is asked for it."""
    cache, full = tmp_path / "cache", [tmp_path / "cache"]
    cache.mkdir()
    monkeypatch.setenv("DISBACK_CACHE", str(cache))
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda place: SimpleNamespace(
        free=10**7 - (place in full)))
    line = refused(degrade.main, [*argv, "--out", tmp_path / "run"])
    assert "10 MB of free space: make room, or name another cache by DISBACK_CACHE" in line
    full.append(tmp_path)
    line = refused(degrade.main, [*argv, "--out", tmp_path / "run"])
    assert "10 MB of free space: make room, or name another --out" in line
    assert [*tmp_path.iterdir()] == [cache] and not [*cache.iterdir()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_takes_for_a_broken_file_is_an_interrupt(refused, number):
    """As matplotlib's writer, which finishes a GIF of no pictures, or safetensors' reader."""
    def main(argv):
        with errors.blame("weights are broken: remove them"):
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None

    before = signal.signal(number, signal.default_int_handler)  # where tests run behind, ignored
    try:
        assert refused(main, [], 130) == "error: interrupted"
        signal.signal(number, signal.SIG_IGN)  # as of what a shell starts in the background
        command.run(main)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("rank, waits", [("0", 0), ("1", 1), ("10", 1), ("", 0)])
def test_the_first_rank_has_the_word(refused, monkeypatch, rank, waits):
    """torchrun ends the others once it has ended, while they still wait."""
    slept, handler = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(command.time, "sleep", lambda seconds: slept.append(
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL))
    assert "--nonsense" in refused(degrade.main, ["toy2d", "--nonsense"])
    signal.signal(signal.SIGTERM, handler)
    assert slept == [True] * waits


def test_a_rank_that_lost_another_ends_in_a_line(capsys, monkeypatch):
    def main(argv):
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed "
                           "by peer [127.0.0.1]:1")

    with pytest.raises(RuntimeError):
        command.run(main)
    monkeypatch.setattr(command.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(command.ranks, "rank", lambda: 1)
    with pytest.raises(SystemExit, match="2"):
        command.run(main)
    assert capsys.readouterr().err == "error on rank 1: another rank has ended before\n"


def test_a_picture_that_was_not_made_here_is_not_replaced(tmp_path):
    for made, name in ((False, "mine.png"), (True, "grid.png")):
        image = Image.new("RGB", (2, 2))
        pictures.save(tmp_path / name, image) if made else image.save(tmp_path / name)
    pictures.must_be_ours(tmp_path / "grid.png", "--out")
    pictures.must_be_ours(tmp_path / "none.png", "--out")
    pictures.save(tmp_path / "large.png", Image.new("1", (19000, 19000)))  # over Pillow's limit
    pictures.must_be_ours(tmp_path / "large.png", "--out")
    (tmp_path / "text.png").write_text("mine")
    np.savez(tmp_path / "mine.npz", 1, 2)
    pictures.save_arrays(tmp_path / "ours.npz", np.ones(1), np.ones(1))
    pictures.must_be_ours(tmp_path / "ours.npz", "--out")
    for name in ("linked.png", "linked.npz"):
        (tmp_path / name).symlink_to("/no/where")
    for name in ("mine.png", "text.png", "mine.npz", "linked.png", "linked.npz"):
        with pytest.raises(disback.Refusal, match=f"{name} is in the way: name another --out"):
            pictures.must_be_ours(tmp_path / name, "--out")


@pytest.mark.parametrize("name", [
    "student.safetensors", "student/SDXL_DisBack.bin", "student", "student/unet",
    "student/unet/diffusion_pytorch_model.safetensors"])
def test_a_runs_own_file_stands_for_the_run_whose_base_it_knows(tmp_path, name):
    about = {"base": "", "timestep": 7, "size": 32}
    files.save_json(tmp_path / "student" / "disback.json", about)
    (tmp_path / "student" / "unet").mkdir()
    for file in ("student.safetensors", "student/SDXL_DisBack.bin"):
        (tmp_path / file).touch()
    place, plain = tmp_path / name, tmp_path / "student/SDXL_DisBack.bin"
    if "unet/" in name:
        assert "is not here" in refusal(generate.find, str(place))
        place.touch()  # its weights may have been changed since: what is named is read
        assert generate.find(str(place)) == (place, about)
        return
    assert generate.find(str(place)) == (plain, about)
    if name.endswith("safetensors"):
        plain.unlink()  # of the same weights twice
        assert generate.find(str(place)) == (place, about)


@pytest.mark.parametrize("about", [{"base": "a/b", "timestep": 7, "size": 48}, {}])
def test_a_student_from_the_hub_says_what_it_is_as_one_here_does(tmp_path, monkeypatch, about):
    """Of the weights that were published without a word, the timestep is DMD2's."""
    def snapshot(name, allow_patterns):
        assert name == "owner/student"
        for file in filter_repo_objects(("README.md", "SDXL_DisBack.bin", "disback.json"),
                                        allow_patterns=allow_patterns):
            if about or not file.endswith("json"):
                files.save_json(tmp_path / "snapshots" / "1a" / file, about)
        return tmp_path / "snapshots" / "1a"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "snapshot_download", snapshot)
    file, found = generate.find("owner/student")
    assert file == tmp_path / "snapshots" / "1a" / "SDXL_DisBack.bin" and file.is_file()
    assert found == (about or {"base": generate.BASE, "timestep": 399})
    for place, remedy in ((tmp_path / "run", "backtrack.py sdxl --resume"), (
            tmp_path / "models--a--b" / "snapshots", "remove")):
        files.save_json(place / "disback.json", {"base": 3})
        assert f"which cannot be: {remedy}" in refusal(generate.find, str(place))
    assert not (file.parent / "README.md").exists()


@pytest.mark.parametrize("place, remedy", [
    ("sdxl-tiny-0123456789abcdef/vae/config.json",
     "remove {}/sdxl-tiny-0123456789abcdef, and it is made again"),
    ("hub/models--a--b/snapshots/1a/vae", "remove {}/hub/models--a--b, and it is fetched again"),
    *((place, "fetch or save it again") for place in (
        "models--mine/vae/config.json", "sdxl-tiny-mine/vae", "", "mine"))])
def test_only_what_is_made_or_fetched_again_is_to_be_removed(
        tmp_path, monkeypatch, place, remedy):
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path))  # where a user may have models as well
    assert layout.again(tmp_path / place) == remedy.format(tmp_path)


def test_what_a_users_model_in_the_cache_lacks_is_no_reason_to_remove_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path))
    shutil.copytree(tiny.folder(tmp_path), tmp_path / "mine")
    (tmp_path / "mine" / "vae" / "config.json").unlink()
    line = refusal(layout.find, str(tmp_path / "mine"), tmp_path)
    assert "lacks vae/config.json: --model takes" in line and "remove" not in line
    (tiny.folder(tmp_path) / "vae" / "config.json").unlink()
    assert f"remove {tiny.folder(tmp_path)}, and it is made" in refusal(layout.find, "", tmp_path)
    monkeypatch.setattr(layout, "snapshot_download", lambda *_, **__: tmp_path / "mine")
    line = refusal(layout.find, "owner/model", tmp_path)
    assert "the hub's owner/model has no such file, or was fetched in part" in line


@pytest.mark.parametrize("steps, of, said", [
    (30, {}, "iteration 20, the run goes on to 30"), (20, {}, ""), (20, {"iteration": 20}, ""),
    (20, {"iteration": 10}, "iteration 10, the run goes on to 20")])  # the export was cut off
def test_a_student_of_before_the_run_was_prolonged_is_told_to_be_one(
        tmp_path, capsys, monkeypatch, steps, of, said):
    files.save_json(tmp_path / "metrics.json", {"steps": 20})
    files.save_json(tmp_path / "config.json", {"backtrack": {"backtrack_steps": steps}})
    about = {"base": None, "timestep": 399, "size": 8} | of
    files.save_json(tmp_path / "student" / "disback.json", about)
    generate.find(str(tmp_path))
    err = capsys.readouterr().err
    assert said in err and bool(err) == bool(said)
    monkeypatch.setattr(ranks, "rank", lambda: 1)  # one rank says it
    generate.find(str(tmp_path))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("there, words", [
    ("-00001-of-00002.safetensors", "lacks unet/diffusion_pytorch_model.safetensors.index.json"),
    (".non_ema.safetensors", "non_ema.safetensors is to be saved again"),
    (".bin", "model.bin is to be saved again as safetensors")])
def test_weights_under_another_name_are_seen(there, words, tmp_path):
    shutil.copytree(tiny.folder(files.cached("")), tmp_path, dirs_exist_ok=True)
    whole = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_name("diffusion_pytorch_model" + there))
    with pytest.raises(disback.Refusal, match=words):
        layout.find(str(tmp_path), tmp_path)


@pytest.mark.parametrize("rank, local", [("0", ""), ("", "first")])
def test_ranks_without_the_other_variables_of_torchrun_or_of_no_number(
        refused, monkeypatch, tmp_path, rank, local):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    argv = ["toy2d", *DEGRADE, "--out", tmp_path / "new"]
    assert "unset RANK and LOCAL_RANK" in refused(degrade.main, argv)
    assert not (tmp_path / "new").exists()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    ranks.join_ranks()
    assert ranks.world_size() == 1


def test_a_name_that_standard_output_cannot_write_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    command.run(lambda argv: print("runs/\u00fc", flush=True))
    assert sys.stdout.buffer.getvalue() == b"runs/\\xfc\n"


def test_a_moved_teacher_is_known_by_its_hash(tmp_path):
    other = tmp_path / "other.safetensors"
    then = {"teacher": str(tmp_path / "one.safetensors"), "teacher_sha256": "a"}
    for name in (str(other), ""):
        assert "--teacher" in refusal(records.must_agree, tmp_path, then, {"teacher": name})
    other.touch()
    now = {"teacher": str(other), "teacher_sha256": "a"}
    records.must_agree(tmp_path, then, now)
    told = refusal(records.must_agree, tmp_path, then, now | {"teacher_sha256": "b"})
    assert "was made with another teacher, its files say: use the files and flags of then" in told
    told = refusal(records.must_agree, tmp_path, {"prompts_sha256": "a"}, {"prompts_sha256": "b"})
    assert "was made with another --prompts, its files say" in told


def test_a_number_of_a_runs_config_that_cannot_be_is_said_to_be_there(tmp_path):
    about = {"problem": "imagenet64", "preset": "tiny"} | dataclasses.asdict(digits.TINY)
    files.save_json(tmp_path / "config.json", {"backtrack": about | {"start_sigma": "80"}})
    with pytest.raises(disback.Refusal, match="config.json was changed: --start-sigma"):
        sample.config_of(SimpleNamespace(source=str(tmp_path), preset=None, node=None))


def test_a_number_of_nodes_that_the_path_has_not_is_no_use_and_said_to_be(
        capsys, monkeypatch, recorded, tmp_path):
    argv = ["toy2d", *BACKTRACK, "--path", str(recorded / "path"), "--out", str(tmp_path / "new")]
    # 999 are more than this preset's steps of stage 1, which is no matter of stage 2.
    for count, rank, said in ((2, 0, True), (4, 0, False), (2, 1, False), (999, 0, True)):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        args, module = cli.parse("backtrack", "", [*argv, "--nodes", str(count)], backtrack.FLAGS)
        args.writes = folder.writes("backtrack", module.WRITES)
        folder.enter("backtrack", args)
        folder.leave()
        assert (f"--nodes {count} changes nothing" in capsys.readouterr().out) == said


@pytest.mark.parametrize("steps, flags, said", [
    (9, [], True), (10, [], False), (9, ["--target", "teacher", "--fake-init", "degraded"], False)])
def test_steps_that_end_before_the_teacher_is_the_target_are_told_at_once(
        capsys, recorded, tmp_path, steps, flags, said):
    args, module = cli.parse("backtrack", "", [
        "toy2d", *BACKTRACK, "--path", str(recorded / "path"), "--out", str(tmp_path / "new"),
        "--interval", "3", "--steps", str(steps), *flags], backtrack.FLAGS)
    args.writes = folder.writes("backtrack", module.WRITES)
    folder.enter("backtrack", args)
    folder.leave()
    told = "after iteration 9 at the earliest, and --steps are 9" in capsys.readouterr().out
    assert told == said


def test_a_locale_that_is_not_utf_8_is_named(refused, monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    word = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    assert "PYTHONUTF8=1" in refused(degrade.main, ["toy2d", "--out", word])
    assert "PYTHONUTF8=1" in refused(degrade.main, ["toy2d", "--out", "caf\u00c3\u00a9"])


def test_a_cache_that_takes_no_files_is_told_by_its_name(tmp_path):
    base, none = tiny.folder(files.cached("")), tmp_path / "file"
    none.touch()
    for use in (tiny.folder, lambda cache: text.embed(base, ["a dog"], cache)):
        with pytest.raises(disback.Refusal, match="file is no folder: .*DISBACK_CACHE"):
            use(none)


def test_a_path_that_lies_elsewhere_is_named_by_its_flag(refused, tmp_path):
    line = refused(backtrack.main, ["toy2d", *BACKTRACK, "--out", tmp_path])
    assert "record the path with degrade.py, or name another by --path" in line


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '"0.5"', "null", "[]"])
def test_a_logs_line_whose_number_is_none_is_told_to_be_the_cause(tmp_path, value):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "node": 0, "swd": {value}}}\n')
    assert "log.jsonl is broken: remove the lines" in refusal(records.read_log, tmp_path)


def test_help_keeps_the_lines_of_what_a_command_says_of_itself(capsys):
    with pytest.raises(SystemExit):
        fid.main(["--help"])
    assert "python -m imagenet64.fid RUN\n\nRUN is a run's folder" in capsys.readouterr().out


def test_another_problems_run_is_no_matter_of_flags(refused, tmp_path):
    files.save_json(tmp_path / "config.json", {"backtrack": {"problem": "sdxl"}})
    line = refused(sample.main, [tmp_path])
    assert "was made with problem sdxl, not imagenet64: name another" in line


def test_what_is_read_is_checked_under_python_O_too():
    """Which leaves out every `assert`."""
    room = pathlib.Path(folder.__file__).parent
    for file in (*room.glob("*.py"), room.parent / "disback.py"):
        of_inner_shapes = {"assert not x0.requires_grad"}
        found = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.Assert)}
        assert found <= of_inner_shapes, file


@pytest.mark.filterwarnings("error::UserWarning")
def test_letters_of_a_prompt_are_no_formula_and_warn_of_nothing(tmp_path):
    figures.sheet(tmp_path / "path.png", "", [("", [[[[0.5] * 3]]])], ["a $_$ face \u732b"])
    assert Image.open(tmp_path / "path.png").size


def test_a_users_backend_of_figures_is_of_no_matter(monkeypatch):
    """A name that matplotlib does not know would fail at its import, which comes later."""
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    runpy.run_path(command.__file__)
    assert os.environ["MPLBACKEND"] == "agg"


def test_the_last_line_of_a_log_that_an_editor_has_stripped_stays_and_a_torn_one_goes(finished):
    file = finished / "log.jsonl"
    whole = file.read_text()
    file.write_text(whole.strip())
    records.cut_log(file, 2)
    assert file.read_text() == whole
    file.write_text(whole + whole[:-2])  # without its last brace
    records.cut_log(file, 2)
    assert file.read_text() == whole


@pytest.mark.parametrize("stream", [None, open("/dev/full", "w", buffering=1)])  # noqa: SIM115
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_command_that_nobody_listens_to_goes_on(monkeypatch, name, stream):
    monkeypatch.setattr(sys, "argv", ["degrade.py"])
    monkeypatch.setattr(sys, name, stream)
    command.run(lambda argv: (print("a line", file=getattr(sys, name)),
                              *tqdm.tqdm("ab", file=getattr(sys, name))))


def test_a_path_whose_first_node_is_not_the_teacher_is_refused(stage1, refused, tmp_path):
    out, _ = stage1
    shutil.copy(out / "path" / "04.safetensors", out / "path" / "00.safetensors")
    line = refused(backtrack.main, ["toy2d", *BACKTRACK, "--path", out / "path",
                                    "--out", tmp_path / "walk"])
    assert "00.safetensors is not the teacher: record the path again" in line


def test_a_resumed_run_removes_nothing_beyond_a_link(finished, refused, tmp_path):
    out = finished
    (out / "snapshots").rename(tmp_path / "elsewhere")
    (out / "snapshots").symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path / "elsewhere")
    for flags in ([], ["--resume"], ["--overwrite"]):  # at the start as when it goes on
        line = refused(backtrack.main, ["toy2d", "--out", out, *BACKTRACK, *flags])
        assert "snapshots is a link: put a folder in its place" in line
    assert names(tmp_path / "elsewhere") == before


def test_a_log_that_leads_elsewhere_is_not_written(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to(tmp_path / "created")
    line = refused(backtrack.main, ["toy2d", *BACKTRACK, "--target", "teacher",
                                    "--out", tmp_path / "run"])
    assert "log.jsonl exists" in line and not (tmp_path / "created").exists()


def test_a_file_that_may_not_be_read_is_told_with_its_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(pathlib.Path, "read_bytes", denied)
    assert "if it is yours, or name another --prompts" in refusal(text.read_prompts, "a.txt")
    monkeypatch.setattr(pathlib.Path, "read_text", denied)
    assert "or name another --compare" in refusal(
        records.check_finished, tmp_path, "toy2d", problem.PRESETS["ring"], tmp_path / "run")
    assert errors.in_words(PermissionError(13, "", "a"), "a is none: name that by --it").endswith(
        "or name another --it")


def denied(file, *_, **__):
    raise PermissionError(13, "Permission denied", str(file))


def test_another_users_lock_is_told_to_be_removed_not_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "open", denied)
    assert f"denied: {tmp_path / '.disback.lock'}: remove it, if no process works" in refusal(
        folder.lock, tmp_path)


def test_a_number_that_is_not_finite_ends_a_run_with_what_is_kept(tmp_path):
    made = Run.__new__(Run)
    made.step, made.state, made.log_file = 4, tmp_path / "state.pt", tmp_path / "log.jsonl"
    for kept in ("", f"; {made.state} is kept as it was"):
        made.sums, made.since = {"loss": torch.tensor(float("inf"))}, 0
        assert refusal(made.log, 1) == (
            "loss is inf at step 4, node 1: try lower learning rates" + kept)
        made.state.touch()
    assert not made.log_file.exists()


def test_the_slash_that_a_shell_adds_to_a_problem_is_taken(capsys):
    with pytest.raises(SystemExit) as ended:
        degrade.main(["toy2d/", "--help"])
    assert ended.value.code == 0 and "--teacher-lr" in capsys.readouterr().out
    assert "invalid choice: 'toy2dx'" in refusal(degrade.main, ["toy2dx"])
