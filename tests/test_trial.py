"""Mistakes that were found by trying the commands with wrong eyes, one test a kind."""

import fcntl
import json
import os
import pathlib
import runpy
import shutil
import signal
import stat
import sys

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, make

import backtrack
import degrade
import disback
from imagenet64 import download, sample
from runtime import command, files, folder, plots, signals
from sdxl import figures, generate, layout, model, problem, tiny


def names(out):
    return sorted(str(file.relative_to(out)) for file in out.rglob("*"))


def test_a_refused_run_leaves_a_folder_as_it_was_found(refused, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for out in ("notes", "new/and/deep"):
        refused(degrade.main, [
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


def test_a_tilde_of_nobody_makes_no_folder(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = refused(degrade.main, ["toy2d", "--out", "~no-such-user/x"])
    assert "--out" in line and "~no-such-user/x" in line and not names(tmp_path)


@pytest.mark.parametrize("main, argv", [
    (sample.main, ["--classes", "3", "7", "runs/digits"]),
    (generate.main, ["--seeds", "1", "2", "a cat"])])
def test_what_must_come_before_a_list_of_numbers_is_named(refused, main, argv):
    line = refused(main, argv)
    assert argv[0] in line and repr(argv[-1]) in line


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
def test_what_lies_beyond_a_link_is_not_replaced(refused, recorded, tmp_path, place):
    out, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(recorded, out)
    shutil.rmtree(out / place, ignore_errors=True)
    mine.mkdir()
    for name in ("path.png", "00.safetensors"):
        (mine / name).write_text("mine")
    (out / place).symlink_to(mine)
    line = refused(degrade.main,
                   ["toy2d", "--out", out, *DEGRADE, "--overwrite"])
    assert "link" in line and {file.read_text() for file in mine.iterdir()} == {"mine"}


def test_a_link_to_a_runs_whole_folder_is_that_run(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    degrade.main(["toy2d", "--out", str(tmp_path / "link"), *DEGRADE, "--overwrite"])


def test_a_folder_in_a_files_place_is_refused_before_anything_goes(refused, recorded, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    (tmp_path / "metrics.json").mkdir()
    (tmp_path / "student.safetensors").write_text("a student")
    before = names(tmp_path)
    line = refused(degrade.main,
                   ["toy2d", "--out", tmp_path, *DEGRADE, "--overwrite"])
    assert "metrics.json" in line and names(tmp_path) == before


@pytest.mark.parametrize("finished", ["student.safetensors", "metrics.json"])
def test_a_student_without_its_numbers_is_not_offered_for_overwriting(
        refused, recorded, tmp_path, finished):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    (tmp_path / finished).write_text("{}")
    for flags in ([], ["--resume"]):
        line = refused(backtrack.main,
                       ["toy2d", "--out", tmp_path, *BACKTRACK, *flags])
        assert "overwrite" not in line


@pytest.fixture
def finished(recorded, tmp_path):
    """As much of a finished run as --compare reads."""
    out = tmp_path / "other"
    line = {"step": 1, "node": 0, "mismatch": 1.0, "network_evals": 1, "swd": 1.0}
    files.save_json(out / "metrics.json", {"problem": "toy2d", "method": "vsd", "steps": 2,
                                           "network_evals": {"stage1": 0, "stage2": 1}})
    (out / "log.jsonl").write_text(json.dumps(line) + "\n")
    for step in (0, 2):
        files.save_tensors(out / "snapshots" / f"{step:07d}.safetensors", {
            "x0": torch.zeros(4, 2), "node": torch.tensor(0)})
    return out


def compared(refused, monkeypatch, recorded, other, out):
    monkeypatch.setattr("toy2d.problem.trained_teacher", lambda *_: pytest.fail("trained"))
    return refused(backtrack.main, [
        "toy2d", "--path", recorded / "path", *BACKTRACK, "--out", out, "--compare", other])


@pytest.mark.parametrize("change", [{"method": "other"}, {"method": None}, {"steps": 0}])
def test_numbers_that_the_comparison_needs_are_looked_at_first(
        finished, recorded, refused, monkeypatch, tmp_path, change):
    file = finished / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    line = compared(refused, monkeypatch, recorded, finished, tmp_path / "new")
    assert next(iter(change)) in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"network_evals": None}, {"swd": "many"}])
def test_so_are_the_lines_of_its_log(finished, recorded, refused, monkeypatch, tmp_path, change):
    file = finished / "log.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | change) + "\n")
    line = compared(refused, monkeypatch, recorded, finished, tmp_path / "new")
    assert next(iter(change)) in line and "log.jsonl" in line


@pytest.mark.parametrize("broken", ["none", "cut", "shape", "nan node"])
def test_so_are_its_snapshots(finished, recorded, refused, monkeypatch, tmp_path, broken):
    file = finished / "snapshots" / "0000002.safetensors"
    if broken == "none":
        shutil.rmtree(file.parent)
    elif broken == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:
        files.save_tensors(file, {"x0": torch.zeros(4, 3 if broken == "shape" else 2),
                                  "node": torch.tensor(float("nan") if "nan" in broken else 0)})
    assert "snapshots" in compared(refused, monkeypatch, recorded, finished, tmp_path / "new")


def test_a_whole_run_can_be_compared_with(finished):
    folder.check_finished(finished, "toy2d")


@pytest.mark.parametrize("place", ["figures", "snapshots", "path"])
def test_a_file_in_a_folders_place_is_refused_before_any_training(
        refused, monkeypatch, tmp_path, place):
    monkeypatch.setattr("toy2d.problem.trained_teacher", lambda *_: pytest.fail("trained"))
    (tmp_path / place).write_text("mine")
    line = refused(degrade.main, ["toy2d", "--out", tmp_path, *DEGRADE])
    assert str(tmp_path / place) in line and "--out" in line


def test_a_sample_that_cannot_be_written_is_not_drawn(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "source", lambda *_: pytest.fail("read"))
    (tmp_path / "file").write_text("mine")
    line = refused(sample.main, ["run", "--to", tmp_path / "file" / "x.npz"])
    assert str(tmp_path / "file") in line and "--to" in line


@pytest.mark.parametrize("flag", ["--start-sigma", "--sigma-data", "--lr-degrade", "--distance"])
@pytest.mark.parametrize("value", ["1e30", "1e-30"])
def test_a_number_whose_square_float32_lacks_is_refused(refused, flag, value):
    line = refused(degrade.main, ["toy2d", flag, value])
    assert flag in line and value.replace("1e", "1e+" if "-" not in value else "1e") in line


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
    with pytest.raises(disback.Refusal, match="DISBACK_CACHE"):
        files.cached("x")


def test_a_missing_package_is_a_line(refused):
    def main(argv):
        import no_such_package  # noqa: F401

    assert "requirements.txt" in refused(main, [])
    assert "no_such_package" in refused(main, [])


def test_a_path_that_was_recorded_again_is_not_blamed_on_a_flag(tmp_path):
    with pytest.raises(disback.Refusal, match="recorded again") as refusal:
        folder.must_agree(tmp_path, {"path": "a"}, {"path": "b"})
    assert "--path" not in str(refusal.value)


def test_a_cache_that_takes_no_files_is_refused_before_a_teacher_is_trained(
        refused, monkeypatch, tmp_path):
    monkeypatch.setattr("toy2d.problem.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path / "file"))
    line = refused(degrade.main, ["toy2d", "--out", tmp_path / "r", *DEGRADE])
    assert str(tmp_path / "file") in line and "DISBACK_CACHE" in line


def test_a_closed_folder_is_named_and_not_the_hidden_one_in_it(monkeypatch, tmp_path):
    def closed(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / ".a.x1y2z3w4.unfinished"))

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", closed)
    with pytest.raises(disback.Refusal, match=f"^permission denied: {tmp_path}$"):
        files.atomically(tmp_path / "a", lambda _: None)


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


@pytest.mark.parametrize("name, at, value", [
    ("steps", 1, "many"), ("steps", 2, -1), ("positions", 1, float("nan")), ("positions", 2, None)])
def test_every_step_and_position_of_a_path_is_a_number(recorded, tmp_path, name, at, value):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "path" / "path.json"
    about = json.loads(file.read_text())
    about[name][at] = value
    file.write_text(json.dumps(about))
    with pytest.raises(disback.Refusal, match=f"{name} in {file}"):
        folder.read_path(tmp_path / "path", {})


def test_a_pipeline_of_pickles_alone_is_told_what_to_do(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(disback.Refusal, match="model.bin is to be saved again as safetensors"):
        layout.find(str(tmp_path), tmp_path)


@pytest.mark.parametrize("held", [[1, 2], torch.zeros(3), {"state_dict": {}}, {"a": 1}])
def test_a_students_file_without_plain_weights_says_so(tmp_path, held):
    torch.save(held, tmp_path / "x.bin")
    with pytest.raises(disback.Refusal, match="x.bin .*no plain state_dict"):
        model.load_unet(dict(tiny.unet().config), tmp_path / "x.bin")


def test_another_models_pipeline_is_named_before_its_text_encoders_are_read(monkeypatch, tmp_path):
    shutil.copytree(tiny.folder(files.cached("")), tmp_path, dirs_exist_ok=True)
    files.save_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    monkeypatch.setattr("sdxl.text.embed", lambda *_: pytest.fail("embedded"))
    with pytest.raises(disback.Refusal, match="is not SDXL but StableDiffusionPipeline"):
        make(problem, model=str(tmp_path))


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
    files.save_json(finished / "metrics.json", {
        "method": "disback", "steps": 10, "network_evals": {"stage1": 3e6, "stage2": 20e6}})
    files.save_tensors(finished / "snapshots" / "0000000.safetensors", {
        "x0": torch.zeros(4, 2), "node": torch.tensor(1)})
    axis = plots.plt.figure().subplots()
    plots.curves({"swd": axis}, [finished], in_steps)
    curve, dotted = axis.lines
    assert (*curve.get_xdata(), *curve.get_ydata()) == (at, 1.0)
    assert dotted.get_xdata()[0] == switched


@pytest.mark.parametrize("line", ['{"step": NaN}', "[1]", '{"step": "1"}', '{"step": -1}',
                                  '{"step": 1, "swd": "a"}', '{"swd": 1}'])
def test_a_line_of_the_log_that_cannot_be_is_refused(finished, line):
    (finished / "log.jsonl").write_text(line + "\n")
    with pytest.raises(disback.Refusal, match="log.jsonl is broken: remove the lines"):
        folder.read_log(finished)


def test_too_little_memory_is_said_where_the_error_says_nothing(refused):
    def main(argv):
        raise MemoryError

    assert "out of memory (lower --batch)" in refused(main, [])


@pytest.mark.parametrize("main, flags", [
    (degrade.main, DEGRADE), (degrade.main, [*DEGRADE, "--resume"]),
    (backtrack.main, BACKTRACK), (backtrack.main, [*BACKTRACK, "--resume"])])
def test_a_folder_in_use_is_said_to_be_so_whatever_else_is_wrong(
        refused, recorded, monkeypatch, tmp_path, main, flags):
    def held(handle, how):
        raise BlockingIOError

    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "path" / "path.json").unlink()
    monkeypatch.setattr(fcntl, "lockf", held)
    line = refused(main, ["toy2d", "--out", tmp_path, *flags])
    assert "another process is at work" in line and "--overwrite" not in line


@pytest.mark.parametrize("stage", ["degrade", "backtrack"])
def test_too_large_a_network_is_not_blamed_on_the_batch_alone(capsys, monkeypatch, tmp_path, stage):
    monkeypatch.setattr(sys, "argv", [
        "stage.py", "toy2d", "--width", str(2**40 - 1), "--out", str(tmp_path / "run"),
        *["--target", "teacher"][:2 * (stage == "backtrack")]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(stage, run_name="__main__")
    assert ended.value.code == 2 and "the network's size" in capsys.readouterr().err


def test_an_interrupt_that_is_ignored_stops_no_training():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.heeding_signals() as came:
            signal.raise_signal(signal.SIGINT)
        assert not came and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
