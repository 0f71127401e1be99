"""What a mistake with SDXL's files, prompts and sizes gets: one line, nothing written or lost."""

import importlib
import json
import logging
import math
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import edit, make, refusal
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import backtrack
import degrade
from runtime import errors, files, folder, ranks
from sdxl import generate, layout, memory, model, problem, settings, text, tiny

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("changes, cause", [
    ({"size": 36}, "size must be divisible by 8"), ({"timestep": 1000}, "timestep"),
    ({"t_min": 500, "t_max": 400}, "--t-min"), ({"t_max": 1000}, "--t-max"),
    ({"guidance": -1.0}, "guidance"), ({"precision": "fp16"}, "precision"),
    ({"clip": 0.0}, "clip"),
    ({"switch": "adaptive"}, "networks that are not guided")])
def test_values_that_make_no_sense_are_refused_by_name(changes, cause):
    assert cause in refusal(make, problem, "tiny", **changes)


@pytest.mark.parametrize("name", ["", "somebody/something", "no/such/place", "./nothing"])
def test_without_network_or_local_model_the_files_and_the_flag_are_named(offline, tmp_path, name):
    preset, changes = ("tiny", {"model": name}) if name else ("full", {})
    line = refusal(make, problem, preset, **changes)
    assert "--model" in line and UNET in line
    assert "text_encoder_2/model.safetensors" in line and "tokenizer_2/" in line
    assert ("Error: " in line) == (name in ("", "somebody/something"))  # what the hub's client said


@pytest.mark.parametrize("name, spoil, cause", [
    (UNET, None, "lacks"), ("model_index.json", None, "lacks"),
    ("scheduler/scheduler_config.json", None, "lacks"), ("vae/config.json", lambda _: b"{}", "VAE"),
    *((f"{part}/{stem}.safetensors", lambda whole: whole[:-100],
       "is broken: fetch or save it again") for part, stem in layout.PARTS.items())])
def test_a_file_that_is_missing_or_broken_is_named_before_anything_is_computed(
        mine, name, spoil, cause):
    whole = (mine / name).read_bytes()
    (mine / name).unlink()
    if spoil:
        (mine / name).write_bytes(spoil(whole))
    line = refusal(layout.find, str(mine), mine)
    assert cause in line and name in line and str(mine) in line and "unet/config.json" not in line


def test_a_model_that_is_not_sdxl_is_refused_before_its_text_encoders_are_read(mine, monkeypatch):
    monkeypatch.setattr(text, "embed", lambda *_: pytest.fail("embedded"))
    edit(mine / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "not SDXL but StableDiffusionPipeline" in refusal(
        make, problem, "tiny", model=str(mine))
    edit(mine / "model_index.json", _class_name="StableDiffusionXLPipeline")
    edit(mine / "unet" / "config.json", addition_embed_type=None)
    assert "addition_embed_type None, not text_time: name" in refusal(
        make, problem, "tiny", model=str(mine))
    edit(mine / "unet" / "config.json", addition_embed_type="text_time", in_channels=9)
    assert "in_channels 9, not 4: name" in refusal(make, problem, "tiny", model=str(mine))
    edit(mine / "unet" / "config.json", in_channels=4, class_embed_type="identity")
    assert "class_embed_type identity, not None: name" in refusal(
        make, problem, "tiny", model=str(mine))
    edit(mine / "unet" / "config.json", class_embed_type=None, addition_time_embed_dim=256)
    line = refusal(make, problem, "tiny", model=str(mine))
    assert "do not fit together: " in line


def test_a_tokenizer_is_one_file_or_two_and_is_missed_before_anything_is_computed(mine):
    for name in ("tokenizer", "tokenizer_2"):
        (mine / name / "tokenizer.json").unlink()
        (mine / name / "vocab.json").touch()
    line = refusal(layout.find, str(mine), mine)
    assert "lacks tokenizer/merges.txt, tokenizer_2/merges.txt: --model" in line
    for name in ("tokenizer", "tokenizer_2"):
        (mine / name / "merges.txt").touch()
    assert layout.find(str(mine), mine) == mine
    (mine / "tokenizer" / "tokenizer_config.json").unlink()
    assert "lacks tokenizer/tokenizer_config.json: --model" in refusal(
        layout.find, str(mine), mine)


@pytest.mark.parametrize("value", [None, 10**30, 0, -3, "77", 78])
def test_a_tokenizer_that_does_not_cut_to_77_tokens_is_refused(mine, base, tmp_path, value):
    edit(mine / "tokenizer_2" / "tokenizer_config.json", model_max_length=value)
    assert f"tokenizers in {mine} are broken: fetch" in refusal(
        text.embed, mine, ["a dog"], tmp_path)
    assert f"{mine} is no SDXL pipeline: fetch" in refusal(
        generate.load, str(base / "unet" / "diffusion_pytorch_model.safetensors"), str(mine))


@pytest.mark.parametrize("part, changes, cause", [
    ("text_encoder", {"hidden_size": 24}, "do not fit together"),
    ("text_encoder", {"max_position_embeddings": 60}, "reads 60 tokens of 600 words"),
    ("text_encoder_2", {"vocab_size": 517}, "reads 77 tokens of 517 words, its tokenizer writes 77 "
     "of 518")])
def test_a_text_encoder_that_does_not_fit_the_rest_is_refused(mine, base, part, changes, cause):
    config = CLIPTextConfig.from_pretrained(base / part)
    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    kind(CLIPTextConfig(**config.to_dict() | changes)).save_pretrained(mine / part)
    assert cause in refusal(make, problem, "tiny", model=str(mine))
    assert cause in refusal(generate.load, str(base / UNET), str(mine))


@pytest.mark.parametrize("factor", ["0.13", None, 0, 1e-30, True])
def test_a_vae_whose_scale_cannot_be_is_refused_before_a_run(mine, factor):
    edit(mine / "vae" / "config.json", scaling_factor=factor)
    assert "vae/config.json is no VAE's" in refusal(layout.find, str(mine), mine)


def test_a_vae_of_other_latents_is_refused_before_a_run(mine):
    edit(mine / "vae" / "config.json", latent_channels=16)
    assert "its latents have not SDXL's 4 channels" in refusal(layout.find, str(mine), mine)


@pytest.mark.parametrize("name", [
    "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_broken_json_of_a_model_is_told_with_what_helps(mine, name):
    hub = mine.parent / "models--a--b" / "snapshots" / "1a"
    shutil.copytree(mine, hub)
    for there, remedy in ((mine, "fetch or save it again"),
                          (hub, f"remove {hub.parents[1]}, and it is")):
        (there / name).write_text("")
        assert f"{name} cannot be read: {remedy}" in refusal(model.must_be_sdxl, there)


@pytest.mark.parametrize("name", ["text_encoder/config.json", "tokenizer/tokenizer.json"])
def test_broken_text_encoders_and_tokenizers_are_refused_with_the_remedy(mine, tmp_path, name):
    (mine / name).write_text("{")
    line = refusal(text.embed, mine, ["a dog"], tmp_path)
    assert str(mine) in line and "fetch or save it again" in line


@pytest.mark.parametrize("changes, cause", [
    ({"rescale_betas_zero_snr": True}, "to inf"), ({"num_train_timesteps": 500}, "is 500"),
    ({"num_train_timesteps": 10**13}, "is 100"), ({"num_train_timesteps": "1"}, "is '1'"),
    ({"trained_betas": [0.01, -0.005] * 500}, "sigmas from"),
    ({"beta_end": 1e300}, "noise schedule"),
    ({"beta_start": 0.0}, "from 0.0"), ({"beta_schedule": "exotic"}, "exotic"),
    ({"_class_name": "EDMEulerScheduler"}, "EDM"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
    ({"beta_start": None}, "noise schedule"),
    ({"beta_start": ...}, "without ['beta_start']"), ({"beta_end": ...}, "without ['beta_end']"),
    ({"beta_schedule": ...}, "without ['beta_schedule']")])
def test_another_kind_of_noise_schedule_is_refused(mine, changes, cause):
    edit(mine / "scheduler" / "scheduler_config.json", **changes)
    line = refusal(model.load_sigmas, mine)
    assert cause in line and "scheduler_config.json has another noise schedule" in line


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_scheduler_that_does_not_predict_epsilon_is_refused_before_prompts_are_encoded(
        mine, monkeypatch, kind):
    monkeypatch.setattr(text, "embed", lambda *_: pytest.fail("embedded"))
    edit(mine / "scheduler" / "scheduler_config.json", prediction_type=kind)
    assert kind in refusal(make, problem, "tiny", model=str(mine))


def test_a_unet_of_unknown_blocks_is_refused_naming_the_file(mine):
    edit(mine / "unet" / "config.json", down_block_types=["Unknown"])
    line = refusal(make, problem, "tiny", model=str(mine))
    assert "does not hold this UNet" in line and str(mine / UNET) in line


@pytest.mark.parametrize("content, cause", [
    (b"", "is empty"), (b" \n\n\t\n", "is empty"), (b"a dog\na caf\xe9\n", "byte 0xe9"),
    ("a cat".encode("utf-16-le"), "UTF-16: save it as UTF-8"),
    (None, "cannot be read")])
def test_prompts_that_cannot_be_read_are_refused(tmp_path, content, cause):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    line = refusal(make, problem, "tiny", prompts=str(file))
    assert cause in line and str(file) in line


def test_line_feeds_alone_separate_prompts(tmp_path):
    """Not the other ends of lines of Unicode, which copied texts have inside; the marks at which
    some editors begin a file are no text, also where files were joined."""
    inside = "".join(map(chr, [0x0B, 0x0C, 0x0D, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029]))
    odd = [f"a{end}b" for end in inside]
    joined = "\ufeff{}\r\n \n\ufeff\n\ufeffa cat\n".format("\r\n".join(odd))
    (tmp_path / "odd.txt").write_bytes(joined.encode())
    assert text.read_prompts(tmp_path / "odd.txt") == [*odd, "a cat"]


def test_prompts_over_77_tokens_are_counted_and_cut_as_diffusers_cuts_them(base, tmp_path, capsys):
    word = "q"  # a token a word, and two for start and end
    fits, long = " ".join([word] * 75), " ".join([word] * 76)
    bank = text.embed(base, [fits, long, long + " dog", "a dog"], tmp_path)
    assert "2 of 4 prompts have over 77 tokens" in capsys.readouterr().err
    assert torch.equal(bank["text"][0], bank["text"][1])
    text.embed(base, [fits, "a dog"], tmp_path)
    assert not capsys.readouterr().err


def test_the_cache_of_embeddings_knows_prompts_and_encoders(base, mine, tmp_path, monkeypatch):
    encode, calls = text.encode, []
    monkeypatch.setattr(text, "encode", lambda *args: calls.append(args) or encode(*args))
    first = text.embed(base, ["a dog"], tmp_path)
    assert torch.equal(text.embed(mine, ["a dog"], tmp_path)["text"], first["text"])
    assert len(calls) == 1  # the same encoders in another folder
    text.embed(base, ["a cat"], tmp_path)
    edit(mine / "text_encoder" / "config.json", hidden_act="gelu")
    assert not torch.equal(text.embed(mine, ["a dog"], tmp_path)["text"], first["text"])
    assert len(calls) == 3


def test_the_shipped_prompts_are_200_different_ones_of_ascii():
    lines = text.read_prompts(text.SHIPPED)
    assert len(set(lines)) == 200 and all(line.isascii() for line in lines)


def test_a_path_of_another_teacher_size_or_prompts_is_refused(mine, tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("a dog")
    other.write_text("a cat")
    argv = ["sdxl", "--prompts", str(one), "--out", str(tmp_path / "run")]
    degrade.main([*argv, "--steps", "1", "--nodes", "1"])
    held = sorted((tmp_path / "run").rglob("*"))
    assert "size" in refusal(backtrack.main, [*argv, "--size", "40"])
    assert "with another --prompts" in refusal(backtrack.main, [*argv, "--prompts", str(other)])
    weights = load_file(mine / UNET)
    files.save_tensors(mine / UNET, {k: 2 * w for k, w in weights.items()})
    assert "with another --model, its" in refusal(backtrack.main, [*argv, "--model", str(mine)])
    assert sorted((tmp_path / "run").rglob("*")) == held


def test_what_generate_cannot_use_is_refused(offline, base, tmp_path):
    (tmp_path / "run").mkdir()
    assert "backtrack.py" in refusal(generate.load, str(tmp_path / "run"), str(base))
    line = refusal(generate.load, "SYZhang0805/DisBack", str(base))
    assert "SDXL_DisBack.bin" in line and "--student" in line
    for content in (b"", b"weights", b"\x80\x04\x95"):
        (tmp_path / "w.bin").write_bytes(content)
        assert "w.bin" in refusal(generate.load, str(tmp_path / "w.bin"), str(base))
    for held in ([1, 2], torch.zeros(3), {"state_dict": {}}, {"a": 1}):
        torch.save(held, tmp_path / "w.bin")
        assert "no plain state_dict" in refusal(
            generate.load, str(tmp_path / "w.bin"), str(base))
    unet = model.load_part(UNet2DConditionModel, base, "unet")
    files.save_tensors(tmp_path / "01.safetensors", model.difference(unet, unet))  # of a node
    assert "no weights of a UNet" in refusal(
        generate.load, str(tmp_path / "01.safetensors"), str(base))
    (tmp_path / "config.json").touch()  # as of a run
    for place, said in ((tmp_path, "a folder here, no prompt: name a run by --student"),
                        (tmp_path / "w.bin", "a file here, no prompt: write the words")):
        assert f"{place} is {said}" in refusal(
            generate.main, [str(place), "a dog", "--out", str(tmp_path / "images")])
    line = refusal(generate.load, str(base / UNET), "no/such/place")
    assert "--base" in line and "--model" not in line
    (tmp_path / "file").touch()
    assert "is no folder: name another --out" in refusal(
        generate.main, ["a dog", "--student", "none", "--out", str(tmp_path / "file")])
    for words in ("a_dog --batch 0", "a_dog --seeds -1", "a_dog --steps 2", "a_dog --sceds 1", ""):
        assert refusal(generate.main, [*words.split(), "--out", str(tmp_path / "images")])
    assert not (tmp_path / "images").exists()


def test_generate_asks_for_its_room_before_it_draws(monkeypatch, base, tmp_path):
    monkeypatch.setattr(generate, "generate", lambda *_: pytest.fail("it drew"))
    size = UNet2DConditionModel.load_config(base / "unet")["sample_size"] * 2
    pictures = 2 * 2  # and as many in the grid, of three bytes a pixel
    free = SimpleNamespace(free=2 * pictures * 3 * size**2 - 1)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda _: free)
    student = tmp_path / "student.safetensors"
    shutil.copy(base / UNET, student)
    line = refusal(generate.main, ["a", "b", "--seeds", "0", "1", "--student", str(student),
                                   "--base", str(base), "--out", str(tmp_path / "images")])
    assert "of free space: make room, or name another --out" in line


@pytest.mark.parametrize("load", [
    lambda: make(problem, "tiny", model="owner/name"), lambda: generate.load("owner/name")])
@pytest.mark.parametrize("error", [
    PermissionError(13, "Permission denied", "/gone/hub"), OSError(28, "No space left on device")])
def test_a_hubs_cache_that_takes_nothing_is_named_with_its_variable(monkeypatch, load, error):
    def snapshot(*_, **__):
        raise error

    for module in (layout, generate):
        monkeypatch.setattr(module, "snapshot_download", snapshot)
    # The hub's cache may lie in ours.
    monkeypatch.setenv("DISBACK_CACHE", str(Path(huggingface_hub.constants.HF_HUB_CACHE).parent))
    line = refusal(load)
    assert line.endswith(("name another place by HF_HOME", "name another place by HF_HUB_CACHE"))
    assert (error.filename or huggingface_hub.constants.HF_HUB_CACHE) in line


@pytest.mark.parametrize("name, change, cause", [
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 100}, "num_train_timesteps"),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "not SDXL"),
    ("unet/config.json", {"addition_time_embed_dim": None}, "do not fit together"),
    ("unet/config.json", {"sample_size": 16.5}, "sample_size is 16.5"),
    ("unet/config.json", {"sample_size": -16}, "sample_size is -16")])
def test_a_base_of_another_kind_serves_no_student(mine, base, name, change, cause):
    edit(mine / name, **change)
    assert cause in refusal(generate.load, str(base / UNET), str(mine))


def test_a_scheduler_of_sdxls_noise_serves_whatever_its_class_would_do(mine, base, tmp_path):
    """DPM++ has an infinity in its config; DDIM's own would clip the latents."""
    edit(mine / "scheduler/scheduler_config.json", lambda_min_clipped=-math.inf, clip_sample=True)
    assert torch.equal(model.load_sigmas(mine), model.load_sigmas(base))
    pipe, _ = generate.load(str(base / UNET), str(mine))
    assert not pipe.scheduler.config.clip_sample
    shutil.copy(base / UNET, tmp_path / "student.safetensors")
    generate.export(tmp_path, mine, 0, base="", timestep=1, size=8)
    config = json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())
    assert config["clip_sample"] is False
    edit(mine / "scheduler/scheduler_config.json", beta_start=math.nan)
    assert "noise schedule" in refusal(model.load_sigmas, mine)


def test_all_that_a_folder_lacks_is_told_at_once_and_of_a_base_no_unet(mine, base):
    for name in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors", UNET):
        (mine / name).unlink()
    line = refusal(model.find, str(mine), mine)
    assert "vae/config.json, " in line and f"lacks vae/config.json, {UNET}, vae/diff" in line
    line = refusal(generate.load, str(base / UNET), str(mine / "gone"))
    assert "vae/diffusion" in line and "unet/config.json" in line and UNET not in line.partition(
        "--base takes")[2]


def test_a_rank_of_another_cache_makes_no_pipeline(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert "name one cache for all ranks by DISBACK_CACHE" in refusal(tiny.folder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_where_the_tiny_pipeline_is_written(monkeypatch, tmp_path):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tiny, "pipeline", lambda: SimpleNamespace(save_pretrained=full))
    line = refusal(tiny.folder, tmp_path)
    assert all(words in line for words in ("cannot write", "No space left", "make room"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more, cause", [
    ({"minus_teacher.more": torch.zeros(1)}, "more"), ({"bias": torch.zeros(2)}, "no difference"),
    ({"minus_teacher.bias": torch.zeros(1)}, "bias"),  # which could be added to any shape
    ({"minus_teacher.bias": torch.tensor([0, torch.inf])}, "not finite: bias"),
    ({"minus_teacher.bias": torch.zeros(2, dtype=torch.int8)}, "torch.int8")])
def test_a_node_whose_difference_does_not_fit_is_refused(tmp_path, more, cause):
    net = torch.nn.Linear(2, 2)
    files.save_tensors(tmp_path / "00.safetensors", net.state_dict())
    good = model.difference(net, net)
    files.save_tensors(tmp_path / "01.safetensors", good)
    files.save_tensors(tmp_path / "02.safetensors", good | more)
    model.add_difference(tmp_path / "01.safetensors", net)
    with pytest.raises(ValueError, match=cause):
        model.add_difference(tmp_path / "02.safetensors", net)


def test_a_model_card_that_a_user_has_edited_stays(base, tmp_path, monkeypatch, capsys):
    moved, move = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *way: (moved.append(way[1].name), move(*way)))
    shutil.copy(base / UNET, tmp_path / "student.safetensors")
    card = tmp_path / "student" / "README.md"
    generate.export(tmp_path, base, 0, base="", timestep=1, size=8)
    generate.export(tmp_path, base, 0, base="", timestep=2, size=16)  # as after --overwrite
    assert "timesteps=[2], height=16" in card.read_text() and not capsys.readouterr().out
    assert moved[-1] == "disback.json"  # once all else is there
    card.write_text(card.read_text().replace("one step", "a step"))
    generate.export(tmp_path, base, 0, base="", timestep=3, size=8)
    assert "timesteps=[2]" in card.read_text()
    said = capsys.readouterr().out
    assert f"{card} was edited, or is an earlier version's, and is kept: remove it" in said


def test_a_disk_that_is_full_at_the_end_is_told_and_keeps_what_was_there(
        base, tmp_path, monkeypatch):
    shutil.copy(base / UNET, tmp_path / "student.safetensors")
    files.save_json(tmp_path / "student" / "disback.json", {"kept": True})
    save = UNet2DConditionModel.save_pretrained

    def full(*args, **keywords):
        save(*args, **keywords)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", full)
    assert "make room" in refusal(generate.export, tmp_path, base, 0, base="", timestep=1, size=8)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["student", "student.safetensors"]
    assert files.load_json(tmp_path / "student" / "disback.json", "") == {"kept": True}


def test_a_full_disk_is_named_where_the_library_that_writes_does_not(
        base, tmp_path, monkeypatch):
    shutil.copy(base / UNET, tmp_path / "student.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    def fail(*_):
        monkeypatch.setattr("builtins.open", full)  # only now: what is before has room
        raise RuntimeError("unexpected pos 337856 vs 337744")

    for owner, name, made, call in (
            (tiny.StableDiffusionXLPipeline, "save_pretrained", tiny.NAME,
             lambda: tiny.folder(tmp_path)),
            (torch, "save", "student",
             lambda: generate.export(tmp_path, base, 0, base="", timestep=1, size=8))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            line = refusal(call)
        monkeypatch.undo()
        assert f"{tmp_path}/{made}" in line and "No space left on device: make room" in line
        assert sorted(f.name for f in tmp_path.iterdir()) == ["student.safetensors"]


def test_the_student_of_a_run_that_is_replaced_is_removed_and_what_is_beside_it_is_not(
        base, tmp_path):
    files.save_json(tmp_path / "config.json", {"backtrack": {"problem": "sdxl"}})
    shutil.copy(base / UNET, tmp_path / "student.safetensors")
    files.save_json(tmp_path / "student" / "mine.json", {})
    for _ in range(2):  # the figures of a finished run may be drawn again
        generate.export(tmp_path, base, 0, base="", timestep=1, size=8)
    (tmp_path / "student.safetensors").unlink()
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "student").rglob("*.*")
            if file.is_file()} == {0o666 & ~files.UMASK}
    made = SimpleNamespace(config=settings.TINY)
    args = SimpleNamespace(out=tmp_path, problem="sdxl", preset="tiny", seed=0, overwrite=False,
                           resume=False, accumulate=1, shard=False, compile=False,
                           config=problem.PRESETS["tiny"],
                           writes=folder.writes("backtrack", problem.WRITES))
    assert "student/unet/config.json exists" in refusal(folder.refuse_taken, tmp_path, args)
    args.overwrite = True
    folder.refuse_taken(tmp_path, args)
    folder.claim(args, made, "backtrack", {}, 0)
    assert {file.name for file in (tmp_path / "student").iterdir()} == {"README.md", "mine.json"}


@pytest.mark.parametrize("call, words", [(open, "{}"), (os.system, "touch {}")])
def test_code_in_a_file_of_weights_is_not_run(base, tmp_path, call, words):
    """Of the system's own functions torch speaks in other words."""
    class Bomb:
        def __reduce__(self):
            return (call, (words.format(tmp_path / "ran"), *(["w"] if call is open else [])))

    torch.save({"x": Bomb()}, tmp_path / "bomb.bin")
    said = refusal(generate.load, str(tmp_path / "bomb.bin"), str(base))
    assert "bomb.bin" in said and "holds more than tensors" in said
    assert "weights_only" not in said  # nobody is told to trust a file
    assert not (tmp_path / "ran").exists()


def test_a_dry_run_writes_nothing(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        degrade.main(["sdxl", "--out", str(tmp_path / "run"), "--dry-run"])
    assert not ended.value.code and "AdamW" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file, changes", [
    ("unet/config.json", {"in_channels": 9}), ("unet/config.json", {"down_block_types": ["No"]}),
    ("unet/config.json", {"transformer_layers_per_block": None}),
    ("unet/config.json", {"addition_embed_type": None, "block_out_channels": [32]}),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"})])
def test_a_dry_run_refuses_what_the_run_would(mine, file, changes):
    edit(mine / file, **changes)
    assert str(mine) in refusal(problem.dry_run, settings.Config(model=str(mine)))


def test_a_dry_run_says_whose_numbers_it_prints_and_heeds_the_size_of_any_model(
        mine, monkeypatch):
    tiny = problem.dry_run(replace(settings.TINY, model=str(mine)))
    larger = replace(settings.TINY, model=str(mine), size=64)
    assert tiny == problem.dry_run(settings.TINY) != problem.dry_run(larger)
    assert "261,684 parameters" in tiny and "note" not in tiny
    monkeypatch.setattr(memory, "BASE", json.loads((mine / "unet/config.json").read_text()))
    assert "some/model is no folder here; these are SDXL base's" in problem.dry_run(
        replace(settings.FULL, model="some/model", nodes=3))
    for place in ("/no/where", str(mine / "unet"), str(mine / UNET), "https://host/owner/model"):
        assert place in refusal(problem.dry_run, replace(settings.FULL, model=place))


def test_the_settings_are_there_without_the_libraries_that_take_seconds_to_load(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sdxl"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # to import it would raise
    assert importlib.import_module("sdxl.problem").PRESETS


@pytest.mark.parametrize("name", ["transformers.utils.import_utils", "diffusers.schedulers",
                                  "huggingface_hub.utils._http"])
def test_the_libraries_warnings_are_off_from_the_import_on(name):
    """One of transformers comes as pipelines are imported, one of the hub's at every retry."""
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)


def test_a_model_among_what_a_run_replaces_is_refused(tmp_path, refused):
    unet = tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    unet.parent.mkdir(parents=True)
    unet.write_text("of a pipeline that was put together there")
    files.save_json(tmp_path / "run" / "config.json", {"backtrack": {"problem": "sdxl"}})
    line = refused(degrade.main, ["sdxl", "--out", tmp_path / "run", "--overwrite", "--model",
                                  tmp_path / "run" / "student"])
    assert f"{unet} is to be read, and would be replaced: name another --out" in line
    assert unet.exists()
