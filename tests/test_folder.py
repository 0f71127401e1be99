"""A run's folder: whose files go, who may use it at a time, and what is refused before any work."""

import json
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, ROOT, refusal

import backtrack
import degrade
import disback
from runtime import command, files, folder, run
from runtime.interface import Config


def everything(out):
    return {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("config", [
    None, '{"model_type": "clip"}', '["degrade"]', '{"degrade": "no problem"}',
    '{"degrade": {"problem": ["toy2d"]}}'])
def test_nothing_goes_in_a_folder_that_is_no_runs(refused, tmp_path, config):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "path.png").write_text("mine")
    (tmp_path / "log.jsonl").write_text("mine")
    if config:
        (tmp_path / "config.json").write_text(config)
    before = everything(tmp_path)
    argv = ["toy2d", "--out", tmp_path, *DEGRADE, "--overwrite"]
    assert "name another --out" in refused(degrade.main, argv)
    assert everything(tmp_path) == before


def test_a_new_stage_1_takes_all_that_the_old_run_wrote_and_nothing_else(finished):
    out, argv = finished
    mine = [out / name for name in ("notes.txt", "figures/path2.png", "snapshots/best.safetensors",
                                    "path/old/00.safetensors", ".tmpabcdef")]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    degrade.main([*argv[:3], *DEGRADE, "--overwrite"])
    assert all(file.read_text() == "mine" for file in mine)
    held = {file.relative_to(out).parts[0] for file in everything(out).keys() - mine}
    assert held == {".disback.lock", "config.json", "path"}
    assert list(json.loads((out / "config.json").read_text())) == ["degrade"]


@pytest.mark.parametrize("main, words", [
    (degrade.main, ["--overwrite"]), (backtrack.main, ["--target", "teacher", "--overwrite"]),
    (backtrack.main, ["--target", "teacher"])])
def test_a_run_of_another_problem_is_never_overwritten_nor_joined(
        recorded, refused, tmp_path, main, words):
    """Its figures and its path would stay, and be taken for the new run's."""
    out = shutil.copytree(recorded / "path", tmp_path / "path").parent
    shutil.copy(recorded / "config.json", out)
    before, words = everything(out), [*words, "--teacher", out / "none"]  # ends soon, if it begins
    assert "of toy2d" in refused(main, ["imagenet64", "--out", out, *words])
    assert everything(out) == before


def test_a_finished_student_is_never_offered_for_overwriting(finished, refused):
    out, argv = finished
    assert "overwrite" not in refused(backtrack.main, argv)
    (out / "state.pt").write_bytes(b"broken")
    assert "overwrite" not in refused(backtrack.main, [*argv, "--resume"])
    (out / "state.pt").unlink()
    line = refused(backtrack.main, [*argv, "--resume"])
    assert "overwrite" not in line and "student.safetensors" in line


@pytest.mark.parametrize("flag", ["--out", "--path", "--compare"])
def test_an_empty_path_is_refused(refused, monkeypatch, tmp_path, flag):
    monkeypatch.chdir(tmp_path)
    line = refused(backtrack.main, ["toy2d", *BACKTRACK, flag, ""])
    assert "empty" in line and not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder_and_an_empty_variable_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.path("~/x") == tmp_path / "x"
    for value in ("", "~/.cache/disback"):
        monkeypatch.setenv("DISBACK_CACHE", value)
        assert files.cached("a") == tmp_path / ".cache" / "disback" / "a"


def test_a_second_process_in_a_folder_is_refused_until_the_first_is_dead(refused, tmp_path):
    """The first is killed, and so cannot tidy up."""
    hold = ("import sys, pathlib\nfrom runtime import folder\n"
            "folder.lock(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()")
    first = subprocess.Popen([sys.executable, "-c", hold, tmp_path], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == "held\n"
    before = everything(tmp_path)
    for flags in ([], ["--overwrite"]):
        argv = ["toy2d", "--out", tmp_path, *DEGRADE, *flags]
        assert "another process" in refused(degrade.main, argv)
    assert everything(tmp_path) == before
    first.kill()
    first.communicate()
    degrade.main(list(map(str, argv)))


def test_files_get_the_modes_that_umask_asks_for(tmp_path):
    """As open() gives them, which is the expectation."""
    (tmp_path / "plain").write_text("")
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    files.save_tensors(tmp_path / "new" / "tensors", {"x": torch.zeros(1)})
    files.save_json(tmp_path / "new" / "json", {})
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new").iterdir()} == {wanted}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == wanted | 0o111 & ~files.UMASK


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("path.json.unfinished", "kept.json"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    files.save_json(tmp_path / "kept.json", {"a": 1})
    nodes = [tmp_path / "a", tmp_path / "b"]
    for node in nodes:
        files.save_tensors(node, {"x": torch.zeros(1)})
    disback.DegradationPath.create(tmp_path, nodes, steps=[0, 1], positions=[0.0, 1.0])
    assert (tmp_path / "victim").read_text() == "mine"
    assert files.load_json(tmp_path / "kept.json", "") == {"a": 1}


def test_a_run_of_constant_rates_can_be_prolonged_to_the_bits_of_the_longer_one(
        recorded, tmp_path, no_figures):
    argv = ["toy2d", "--path", str(recorded / "path"), *BACKTRACK, "--decay", "constant"]
    backtrack.main([*argv, "--out", str(tmp_path / "long"), "--steps", "12"])
    backtrack.main([*argv, "--out", str(tmp_path / "short"), "--steps", "7"])
    backtrack.main([*argv, "--out", str(tmp_path / "short"), "--steps", "12", "--resume",
                    "--log-every", "3", "--save-every", "5", "--nodes", "2"])
    long, short = ((tmp_path / name / "student.safetensors").read_bytes()
                   for name in ("long", "short"))
    assert long == short
    assert json.loads((tmp_path / "short" / "metrics.json").read_text())["steps"] == 12
    config = json.loads((tmp_path / "short" / "config.json").read_text())["backtrack"]
    assert config["backtrack_steps"] == 12 and config["log_every"] == 3


@pytest.mark.parametrize("main, flags, why", [
    (backtrack.main, ["--steps", "99"], "--decay constant"),
    (backtrack.main, ["--lr-fake", "1"], "--lr-fake"),
    (degrade.main, ["--steps", "99"], "nodes are spread"),
    (degrade.main, ["--nodes", "2"], "--nodes"), (degrade.main, ["--width", "7"], "--width")])
def test_a_resume_by_other_flags_is_refused_before_a_teacher_is_trained(
        finished, refused, monkeypatch, main, flags, why):
    out, argv = finished
    argv = argv if main is backtrack.main else [*argv[:3], *DEGRADE]
    monkeypatch.setattr("toy2d.problem.trained_teacher", lambda *_: pytest.fail("trained"))
    assert why in refused(main, [*argv, *flags, "--resume"])


def test_fewer_steps_than_are_done_are_refused(recorded, refused, tmp_path, no_figures):
    argv = ["toy2d", "--path", str(recorded / "path"), *BACKTRACK, "--decay", "constant", "--out",
            str(tmp_path)]
    backtrack.main(argv)
    assert "is at step" in refused(backtrack.main, [*argv, "--steps", "3", "--resume"])


@pytest.mark.parametrize("change", [
    None, {"problem": "sdxl"}, {"network_evals": {"stage1": -1, "stage2": 1}}, {"steps": "many"},
    {"network_evals": None}])
def test_what_cannot_be_compared_with_is_refused_before_a_teacher_is_trained(
        finished, recorded, refused, monkeypatch, tmp_path, change):
    other, argv = finished
    file = other / "metrics.json"
    if change:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        file.unlink()
    monkeypatch.setattr("toy2d.problem.trained_teacher", lambda *_: pytest.fail("trained"))
    new = ["toy2d", "--path", recorded / "path", *BACKTRACK, "--out", tmp_path / "new"]
    line = refused(backtrack.main, [*new, "--compare", other])
    assert str(other) in line and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, value", [
    ("network_evals", -5), ("network_evals", "many"), ("positions", [0, 1, 2, 3, float("nan")]),
    ("steps", 7)])
def test_a_number_of_the_path_that_cannot_be_is_refused_before_a_teacher_is_trained(
        recorded, refused, monkeypatch, tmp_path, name, value):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "path" / "path.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    monkeypatch.setattr("toy2d.problem.trained_teacher", lambda *_: pytest.fail("trained"))
    line = refused(backtrack.main, ["toy2d", "--out", tmp_path, *BACKTRACK])
    assert "path.json" in line


def test_a_stage_refuses_the_flags_of_the_other(refused):
    for main, flag in ((degrade.main, "--lr-student"), (backtrack.main, "--lr-degrade")):
        assert flag in refused(main, ["toy2d", flag, "1"])


def test_help_shows_the_values_of_the_preset_that_is_named(capsys):
    for preset, size in (("tiny", "(32)"), ("full", "(1024)")):
        with pytest.raises(SystemExit):
            degrade.main(["sdxl", "--preset", preset, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert size in text.split("--size INT")[2].split("--")[0]


def test_compiling_without_a_compiler_is_refused_at_once(refused, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("toy2d.problem.trained_teacher", lambda *_: pytest.fail("trained"))
    line = refused(degrade.main, ["toy2d", "--compile"])
    assert "compiler" in line and "--no-compile" in line


@pytest.mark.parametrize("where, said", [
    (files.lost("the teacher in training"), "interrupted the teacher in training"),
    (files.blame("state.pt is broken"), "interrupted")])
def test_an_interrupt_outside_the_loops_ends_in_a_line(capsys, monkeypatch, where, said):
    def main(argv):
        with where:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == 130 and capsys.readouterr().err.strip() == "error: " + said


def test_a_full_disk_is_named_whatever_the_writer_says(monkeypatch, tmp_path):
    def fail(beside):
        raise RuntimeError("unexpected pos 15616 vs 15504")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        assert "a.pt: No space left on device: make room" in refusal(
            files.atomically, tmp_path / "a.pt", fail)
    assert "unexpected pos" in refusal(files.atomically, tmp_path / "a.pt", fail)
    assert not list(tmp_path.iterdir())


def test_stage_2_asks_for_the_room_of_two_checkpoints(monkeypatch, tmp_path):
    """Weights and two moments of Adam, of 4 bytes: a net of 6 numbers, one of 2 that learns not."""
    nets = {"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(1, 1)}
    made = run.Run.__new__(run.Run)
    made.stage, made.nets, made.optimizers = "backtrack", nets, {"a": None}
    assert made.room(None) == 2 * 4 * (6 + 2 + 2 * 6)


def test_what_matters_to_a_stage_is_said_by_the_fields():
    first, second = (folder.what_matters(Config(), stage) for stage in ("degrade", "backtrack"))
    assert {"batch", "lr_degrade", "nodes"} <= set(first) and "lr_fake" not in first
    assert {"batch", "lr_fake", "interval"} <= set(second) and "lr_degrade" not in second
    assert not {"save_every", "log_every"} & (set(first) | set(second))
