"""A run's folder: whose files go, who may use it at a time, and what is refused before any work."""

import importlib
import json
import os
import resource
import shutil
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKTRACK, DEGRADE, edit, read, refusal, same
from processes import Started
from safetensors.torch import load_file

import backtrack
import degrade
import disback
import runtime
from runtime import command, files, folder, run
from toy2d import figures


def everything(out):
    return {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("config", [
    None, "{", '{"model_type": "clip"}', '["degrade"]', '{"degrade": "no problem"}',
    '{"degrade": {"problem": ["toy2d"]}}'])
def test_nothing_goes_in_a_folder_that_is_no_runs(refused, tmp_path, config):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "path.png").write_text("mine")
    (tmp_path / "log.jsonl").write_text("mine")
    if config:
        (tmp_path / "config.json").write_text(config)
    before = everything(tmp_path)
    argv = ["toy2d", "--out", tmp_path, *DEGRADE, "--overwrite"]
    line = refused(degrade.main, argv)
    assert "name another --out" in line and (not config or "config.json" in line)
    assert everything(tmp_path) == before


def test_a_new_stage_1_takes_all_that_the_old_run_wrote_and_nothing_else(capsys, finished):
    """Also nothing whose name only resembles a run's; it names what stays."""
    out, argv = finished
    mine = [out / name for name in (
        "notes.txt", "figures/path2.png", "snapshots/best.safetensors", ".tmpabcdef",
        "path/old/00.safetensors", "path/07-mine.safetensors", "path/step-mine.safetensors",
        "snapshots/2024-best.safetensors", ".notes.unfinished", "figures/.x.unfinished/mine")]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    degrade.main([*argv[:3], *DEGRADE, "--overwrite"])
    left = "of the run before: .notes.unfinished, .tmpabcdef, notes.txt\n"
    assert left in capsys.readouterr().out
    assert all(file.read_text() == "mine" for file in mine)
    held = {file.relative_to(out).parts[0] for file in everything(out).keys() - {*mine}}
    assert held == {".disback.lock", "config.json", "path"}
    assert list(read(out / "config.json")) == ["degrade"]


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
    """Nor where but one of its two last files is left."""
    out, argv = finished
    assert "overwrite" not in refused(backtrack.main, argv)
    (out / "state.pt").write_bytes(b"broken")
    assert "overwrite" not in refused(backtrack.main, [*argv, "--resume"])
    (out / "state.pt").unlink()
    (out / "metrics.json").rename(out / "kept")
    line = refused(backtrack.main, [*argv, "--resume"])
    assert "overwrite" not in line and "student.safetensors" in line
    (out / "kept").rename(out / "metrics.json")
    (out / "student.safetensors").unlink()
    for flags in ([], ["--resume"]):
        assert "overwrite" not in refused(backtrack.main, [*argv, *flags])


def test_a_tilde_is_the_home_folder_and_an_empty_variable_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.path("~/x") == tmp_path / "x"
    for value in ("", "~/.cache/disback"):
        monkeypatch.setenv("DISBACK_CACHE", value)
        assert files.cached("a") == tmp_path / ".cache" / "disback" / "a"
    monkeypatch.setenv("HOME", "")
    importlib.reload(runtime)
    assert "HOME" not in os.environ and files.cached("").is_relative_to(Path.home())


def test_a_second_process_in_a_folder_is_refused_until_the_first_is_dead(refused, tmp_path):
    """The first is killed, and so cannot tidy up."""
    out, held = tmp_path / "run", tmp_path / "held"
    first = Started(f"""
import pathlib, time
from runtime import folder
folder.lock(pathlib.Path({str(out)!r}))
pathlib.Path({str(held)!r}).touch()
time.sleep(300)
""")
    first.wait_for(held.exists)
    before = everything(out)
    argv = ["toy2d", "--out", str(out)]
    for main, flags in ((degrade.main, DEGRADE), (backtrack.main, BACKTRACK)):
        for more in ([], ["--overwrite"], ["--resume"]):  # also where there is nothing to resume
            line = refused(main, [*argv, *flags, *more])
            assert "another process works in" in line and "--overwrite" not in line
    assert everything(out) == before
    first.process.kill()
    first.ended()
    degrade.main([*argv, *DEGRADE])


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
        recorded, tmp_path, no_figures, refused):
    argv = ["toy2d", "--path", str(recorded / "path"), *BACKTRACK, "--decay", "constant", "--out"]
    short = tmp_path / "short"
    backtrack.main([*argv, str(tmp_path / "long"), "--steps", "12"])
    backtrack.main([*argv, str(short), "--steps", "7"])
    backtrack.main([*argv, str(short), "--steps", "12", "--resume", "--log-every", "3",
                    "--save-every", "5", "--nodes", "2"])
    assert same(tmp_path / "long", short)
    assert read(short / "metrics.json")["steps"] == 12
    config = read(short / "config.json")["backtrack"]
    assert config["backtrack_steps"] == 12 and config["log_every"] == 3
    assert "is at step 12" in refused(backtrack.main, [*argv, short, "--steps", "3", "--resume"])


@pytest.mark.parametrize("main, flags, why", [
    (backtrack.main, ["--steps", "99"], "--decay constant"),
    (backtrack.main, ["--steps", "99", "--decay", "constant"], "--decay cosine, not constant"),
    (backtrack.main, ["--lr-fake", "1"], "--lr-fake"),
    (degrade.main, ["--steps", "99"], "nodes are spread"),
    (degrade.main, ["--nodes", "2"], "--nodes"), (degrade.main, ["--width", "7"], "--width")])
def test_a_resume_by_other_flags_is_refused_before_a_teacher_is_trained(
        finished, refused, no_training, main, flags, why):
    out, argv = finished
    argv = argv if main is backtrack.main else [*argv[:3], *DEGRADE]
    assert why in refused(main, [*argv, *flags, "--resume"])


@pytest.mark.parametrize("name, value", [
    ("network_evals", -5), ("network_evals", "many"), ("steps", 7), ("steps", [0, "many", 2, 3, 4]),
    ("steps", [0, 1, -1, 3, 4]), ("positions", [0, 1, 2, 3, float("nan")]),
    ("steps", [0, 1, 3, 2, 4]), ("steps", [0, 1, 2, 3.5, 4]), ("positions", [0, 1, 2]),
    ("steps", [False, True, 2, 3, 4]), ("positions", [0, float("nan"), 2, 3, 4]),
    ("positions", [0, 1, None, 3, 4]), ("steps", [])])
def test_a_number_of_the_path_that_cannot_be_is_refused_before_a_teacher_is_trained(
        stage1, refused, no_training, name, value):
    out, _ = stage1
    edit(out / "path" / "path.json", **{name: value})
    assert "path.json" in refused(backtrack.main, ["toy2d", "--out", out, *BACKTRACK])


@pytest.mark.parametrize("change, cause", [
    (lambda w, name: w.pop(name), "names"), (lambda w, name: w.update(x=w.pop(name)), "names"),
    (lambda w, name: w.update({name: w[name][:-1]}), "bias is F32"),
    (lambda w, name: w.update({name: w[name].int()}), "bias is I32")])
def test_a_node_of_another_network_is_told_at_the_start(stage1, refused, change, cause):
    out, _ = stage1
    file = out / "path" / "01.safetensors"
    weights = load_file(file)
    change(weights, next(name for name in sorted(weights) if name.endswith("bias")))
    files.save_tensors(file, weights)
    line = refused(backtrack.main, ["toy2d", "--out", out, *BACKTRACK])
    assert "01.safetensors is not of this network: record" in line and cause in line
    assert not (out / "snapshots").exists()


@pytest.mark.parametrize("name, content, cause", [
    ("metrics.json", "{", "remove it"), ("metrics.json", '{"peak_memory_bytes": "x"}', "peak"),
    ("snapshots/0000002.safetensors", "cut", "remove it, and the figures do without")])
def test_what_the_end_reads_is_read_before_a_run_goes_on(finished, refused, no_training, name,
                                                         content, cause):
    out, argv = finished
    (out / name).write_text(content)
    line = refused(backtrack.main, [*argv, "--resume"])
    assert str(out / name) in line and cause in line


@pytest.mark.parametrize("changes", [
    {"step": 3.5, "since": 0}, {"step": -5, "since": -5}, {"step": True, "since": 0},
    {"since": "x"}, {"since": 10**6}, {"seconds": float("nan")},
    {"sums": {"loss_fake": torch.tensor(float("nan"))}},
    {"others": {"scheduler": {"node": -1}}}, {"others": {"scheduler": {"node": "a"}}}])
def test_a_number_of_a_checkpoint_that_cannot_be_is_refused(finished, refused, no_training,
                                                            changes):
    out, argv = finished
    state = torch.load(out / "state.pt", weights_only=True)
    torch.save(state | changes, out / "state.pt")
    line = refused(backtrack.main, [*argv, "--resume"])
    assert "state.pt is not a checkpoint of this run" in line


def test_a_path_that_is_not_there_is_told_in_the_words_that_help(
        stage1, refused, no_training, tmp_path):
    (out, _), new = stage1, ["toy2d", *BACKTRACK, "--out", tmp_path / "new"]
    line = refused(backtrack.main, [*new, "--path", out])
    assert f"{out} is a run: name {out / 'path'} by --path" in line
    assert "is a file: name its folder" in refused(
        backtrack.main, [*new, "--path", out / "path" / "path.json"])
    assert "record the path with degrade.py" in refused(backtrack.main, new)
    (out / "path").rename(tmp_path / "elsewhere")
    (out / "state.pt").touch()  # of plain VSD, say
    assert f"{out} is a run without a path" in refused(backtrack.main, [*new, "--path", out])
    (tmp_path / "new" / "path").mkdir(parents=True)
    (tmp_path / "new" / "path" / "state.pt").touch()
    assert "degrade.py --resume goes on with it" in refused(backtrack.main, new)


def test_a_run_that_walked_another_path_is_told_to_name_it(finished, refused, no_training):
    out, argv = finished
    shutil.rmtree(out / "path")
    assert "had its path elsewhere, name it by --path" in refused(
        backtrack.main, [*argv, "--resume"])


def test_a_resume_towards_another_target_is_refused_before_a_teacher_is_made(
        pair, recorded, refused, no_training, tmp_path):
    (walked, plain), walks = (shutil.copytree(pair / name, tmp_path / name)
                              for name in ("main", "vsd")), recorded / "path"
    other = shutil.copytree(walks, tmp_path / "other")
    edit(other / "path.json", network_evals=0)
    for out, flags, told in (
            (plain, [], "--target teacher, not path: use the same flags"),
            (plain, ["--path", walks], "--target teacher, not path: use the same flags"),
            (plain, ["--target", "teacher", "--fake-init", "degraded", "--path", walks],
             "--fake-init teacher, not degraded"),
            (walked, ["--target", "teacher"], "--target path, not teacher"),
            (walked, ["--fake-init", "teacher"], "--fake-init degraded, not teacher"),
            (walked, ["--path", other], "recorded again since then, or is not the one of then")):
        assert told in refused(backtrack.main, [
            "toy2d", *BACKTRACK, "--out", out, "--resume", *flags])


@pytest.mark.parametrize("content", ["{}", "[]", '{"mine": 1}'])
def test_a_strangers_config_is_not_replaced(tmp_path, refused, no_training, content):
    (tmp_path / "config.json").write_text(content)
    line = refused(degrade.main, ["toy2d", "--out", tmp_path, *DEGRADE])
    assert "config.json is not of a run: name another --out" in line
    assert (tmp_path / "config.json").read_text() == content


def test_a_node_that_cannot_be_opened_is_told_with_the_remedy(stage1, refused):
    out, _ = stage1
    (out / "path" / "02.safetensors").unlink()
    (out / "path" / "02.safetensors").mkdir()
    line = refused(backtrack.main, ["toy2d", "--out", out, *BACKTRACK])
    assert "02.safetensors" in line and "name another path" in line


@pytest.mark.parametrize("made, gone, main", [
    ("stage1", ("path/state.pt", "path/path.json"), degrade.main),
    ("finished", ("state.pt", "student.safetensors", "metrics.json"), backtrack.main)])
def test_a_run_that_died_before_its_first_checkpoint_is_told_one_way_on(
        request, refused, no_training, made, gone, main):
    out, argv = request.getfixturevalue(made)
    for name in gone:
        (out / name).unlink(missing_ok=True)
    assert "start with --overwrite in its place" in refused(main, [*argv, "--resume"])
    line = refused(main, argv)
    assert "replace it by --overwrite" in line and "--resume" not in line
    with pytest.raises(pytest.fail.Exception):  # it does go on to train
        main([*argv, "--overwrite"])
    assert "start without it" in refused(main, [*argv, "--out", out / "new", "--resume"])
    (out / "config.json").unlink()  # of nobody: --overwrite would be refused
    line = refused(main, [*argv, "--resume"])
    assert "name another --out" in line and "--overwrite" not in line


@pytest.mark.parametrize("main, update", [(degrade.main, "update_score_model"),
                                          (backtrack.main, "vsd_loss")])
def test_a_run_that_failed_at_its_first_step_is_simply_begun_again(
        refused, main, update, monkeypatch, tmp_path, recorded, no_figures):
    argv = ["toy2d", "--out", tmp_path / "run"]
    argv += DEGRADE if main is degrade.main else [*BACKTRACK, "--path", recorded / "path"]

    def large(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(disback, update, large)
        assert "out of memory (lower --batch)" in refused(main, argv)
    assert any(name.name in folder.STARTS for name in (tmp_path / "run").rglob("*"))
    assert "start without it" in refused(main, [*argv, "--resume"])
    config = tmp_path / "run" / "config.json"
    begun = config.read_text()
    config.unlink()  # then it may be a user's
    assert "is no run's folder" in refused(main, argv)
    other, = {"degrade", "backtrack"} - json.loads(begun).keys()
    config.write_text(json.dumps({other: {"problem": "toy2d"}}))
    assert "exists: name another --out" in refused(main, argv)
    config.write_text(begun)
    begun = next(f for f in (tmp_path / "run").rglob("*") if f.name in folder.STARTS)
    begun.rename(tmp_path / "begun")
    begun.mkdir()
    assert f"{begun} was not made by a run, it is a folder" in refused(main, argv)
    begun.rmdir()
    main([*map(str, argv), "--batch", "4"])


def test_help_names_every_field_with_its_comment_and_the_values_of_the_preset(capsys):
    for preset, size in (("tiny", "(32)"), ("full", "(1024)")):
        with pytest.raises(SystemExit) as ended:
            degrade.main(["sdxl", "--preset", preset, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0 and size in text.split("--size INT")[2].split("--")[0]
        assert "--lr-degrade FLOAT learning rate of the degrading teacher" in text
        assert "--steps" in text and "--backtrack-steps" not in text


def test_compiling_without_a_compiler_is_refused_at_once(refused, monkeypatch, no_training):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    line = refused(degrade.main, ["toy2d", "--compile"])
    assert "compiler" in line and "--no-compile" in line


@pytest.mark.parametrize("on_gpu, there, named, missing", [
    (False, "gcc", {}, "finds no g++"), (False, "cc", {"CC": "cc"}, "finds no g++"),
    (False, "g++", {"CXX": "no"}, "CXX names none, but 'no': unset it"),
    (False, "g++", {"CXX": ""}, "CXX names none, but '': unset it"),
    (False, "fails", {"CXX": "fails"}, "CXX names none, but 'fails': unset it"),
    (True, "clang", {"CC": "no"}, "CC names none"), (True, "g++", {}, "finds no gcc"),
    (False, "my", {"CXX": "my"}, ""), (True, "gcc", {}, ""),
    (True, "clang", {}, ""), (True, "my", {"CC": "my"}, "")])
def test_the_compiler_that_is_looked_for_is_the_one_that_torch_will_call(
        tmp_path, monkeypatch, on_gpu, there, named, missing):
    (tmp_path / there).write_text(f"#!/bin/sh\nexit {int(there == 'fails')}")
    (tmp_path / there).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, program in named.items():
        monkeypatch.setenv(name, program)
    if missing:
        missing = missing.replace("g++", "clang++") if sys.platform == "darwin" else missing
        assert missing in refusal(command.check_compiler, on_gpu)
    else:
        command.check_compiler(on_gpu)


@pytest.mark.parametrize("where, said", [
    (files.lost("the teacher is lost"), "interrupted: the teacher is lost"),
    (files.blame("state.pt is broken"), "interrupted")])
def test_sigterm_outside_the_loops_ends_in_a_line_and_lets_go_of_the_folder(
        refused, tmp_path, where, said):
    def main(argv):
        folder.lock(tmp_path / "run")
        with where:
            os.kill(os.getpid(), signal.SIGTERM)

    assert refused(main, [], 130) == "error: " + said
    assert not list(tmp_path.iterdir())


def room_of_stage_2(run, recorded=None):
    """Student and fake, with two moments each, and the average, in fp32, all of it twice."""
    fake = load_file((recorded or run) / "path" / "00.safetensors")
    student = load_file(run / "student.safetensors")
    moments = 2 * (count(fake) + count(student) - student["centre"].numel())
    return 2 * 4 * (count(fake) + 2 * count(student) + moments)


def count(weights):
    return sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize("stage", ["degrade", "backtrack"])
def test_a_disk_without_room_for_a_stage_is_refused_before_its_first_step(
        refused, completed, tmp_path, no_figures, monkeypatch, stage):
    """Of weights: node 0 and 2N candidates, and with two moments twice; 10 MB for all else."""
    nodes = len(list((completed / "path").glob("*.safetensors"))) - 1
    main, argv = degrade.main, ["toy2d", "--out", tmp_path / "run", *DEGRADE]
    whole = 4 * count(load_file(completed / "path/00.safetensors"))
    need = 10**7 + whole * (1 + 2 * nodes + 6)
    if stage == "backtrack":
        main, need = backtrack.main, 10**7 + room_of_stage_2(completed)
        argv = ["toy2d", "--out", tmp_path / "run", *BACKTRACK, "--path", completed / "path"]
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: SimpleNamespace(free=need - 1))
    assert "GB of free space: make room, or name another --out" in refused(main, argv)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: SimpleNamespace(free=need))
    main([str(word) for word in argv])


@pytest.mark.parametrize("exported", [0, 10**6])
def test_what_is_frozen_and_in_no_checkpoint_needs_no_room_but_what_is_exported_does(exported):
    """Of 5 numbers 2 are learnt, with two moments each."""
    net = torch.nn.Linear(1, 2)
    net.extra = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
    net.bias.requires_grad_(False)

    def leave_out(net, state, *_):
        del state["extra.weight"], state["bias"]

    net.register_state_dict_post_hook(leave_out)
    made = run.Run.__new__(run.Run)
    made.stage, made.step, made.config = "backtrack", 0, SimpleNamespace(backtrack_steps=1)
    made.nets, made.optimizers = {"student": net}, {"student": None}
    checkpoint = 4 * (2 + 2 * 2)
    assert made.room(SimpleNamespace(exported=exported)) == 10**7 + (
        checkpoint + max(checkpoint, exported))


def test_what_a_run_holds_already_needs_no_room_again(refused, finished, monkeypatch):
    out, argv = finished
    free = 10**7 - (out / "state.pt").stat().st_size
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    backtrack.main([*argv, "--resume"])  # only draws
    held = sum(file.stat().st_size for file in out.rglob("*") if file.parent.name != "path"
               and file.is_file() and file.name not in ("config.json", ".disback.lock"))
    free = 10**7 + room_of_stage_2(out) - held - 1
    assert "GB of free space" in refused(backtrack.main, [*argv, "--overwrite"])
    assert (out / "state.pt").exists()
    free += 1
    backtrack.main([*argv, "--overwrite"])


@pytest.mark.parametrize("short", [0, 1])
def test_a_prolonged_run_needs_room_for_one_more_checkpoint_beside_what_stays(
        refused, recorded, tmp_path, no_figures, monkeypatch, short):
    argv = ["toy2d", "--out", tmp_path / "run", "--path", recorded / "path", *BACKTRACK,
            "--decay", "constant"]
    backtrack.main([*map(str, argv)])
    need = 10**7 + room_of_stage_2(tmp_path / "run", recorded)
    free = need - (tmp_path / "run" / "state.pt").stat().st_size - short
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    more = [*argv, "--resume", "--steps", "24"]
    if short:
        assert "GB of free space" in refused(backtrack.main, more)
    else:
        backtrack.main([*map(str, more)])


@pytest.mark.parametrize("stage", [degrade, backtrack])
@pytest.mark.parametrize("at", [10, 13])  # where a log, a checkpoint and a snapshot are due or none
def test_a_run_whose_folder_was_moved_writes_no_more_there_and_goes_on_at_the_new_place(
        refused, recorded, tmp_path, no_figures, monkeypatch, stage, at):
    """Another run may have taken the old name."""
    out, there, seen = tmp_path / "run", tmp_path / "there", []
    flags = DEGRADE if stage is degrade else [*BACKTRACK, "--path", str(recorded / "path")]
    argv = ["toy2d", *flags, "--save-every", "5", "--out"]
    count = run.Run.count

    def move(self, **numbers):
        count(self, **numbers)
        seen.append(self.step)
        if self.step == at:
            out.rename(there)
        if self.step == 13:
            out.mkdir()
            (out / ".disback.lock").touch()

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "count", move)
        line = refused(stage.main, [*argv, str(out)])
    assert f"{out} was moved or removed, or its lock was: --resume goes on" in line
    assert seen[-1] == at and [file.name for file in out.rglob("*")] == (
        [".disback.lock"] if at == 13 else [])
    stage.main([*argv, str(there), "--resume"])
    log = read((there / "path" if stage is degrade else there) / "log.jsonl")
    assert [line["step"] for line in log if line["step"] % 10 == 0] == [10, 20]


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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a small file has room, as often
    try:
        line = refusal(files.atomically, tmp_path / "a.pt", fail)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a.pt: File too large: make room" in line
    assert not list(tmp_path.iterdir())


def test_where_figures_fail_the_student_is_said_to_be_kept(finished, refused, monkeypatch):
    out, argv = finished

    def interrupted(*_):
        raise KeyboardInterrupt

    def broken(*_):
        raise disback.Refusal("a snapshot is broken")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw", interrupted)
        assert f"interrupted: the student is in {out}; --resume, not --overwrite, draws" in refused(
            backtrack.main, [*argv, "--resume"], status=130)
    monkeypatch.setattr(figures, "draw", broken)
    assert f"a snapshot is broken; the student is kept in {out}" in (
        refused(backtrack.main, [*argv, "--resume"]))

    def moved(*_):
        out.rename(out.parent / "there")
        raise disback.Refusal("a snapshot is broken")

    monkeypatch.setattr(figures, "draw", moved)
    line = refused(backtrack.main, [*argv, "--resume"])
    assert line.startswith(f"error: {out} was moved or removed") and "kept in" not in line


def test_metrics_are_not_written_into_the_folder_that_took_a_moved_runs_place(
        finished, refused, monkeypatch):
    out, argv = finished
    save = files.save_tensors

    def move(*args):
        save(*args)
        out.rename(out.parent / "there")
        out.mkdir()

    monkeypatch.setattr(files, "save_tensors", move)
    assert "was moved or removed" in refused(backtrack.main, [*argv, "--resume"])
    assert not list(out.iterdir())
