"""What a mistake with SDXL's files, prompts and sizes gets: one line, nothing written or lost."""

import json
import shutil

import huggingface_hub
import pytest
import torch

import backtrack
import degrade
import disback
from sdxl import generate, model, problem, text

SMALL = ["--steps", "3", "--nodes", "2", "--log-every", "50"]


def refused(function, *args, **keywords) -> str:
    with pytest.raises(disback.Refusal) as error:
        function(*args, **keywords)
    return " ".join(str(error.value).split())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "two.txt"
    file.write_text("a dog\na cat\n")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model.find("", tmp_path_factory.getbasetemp())


@pytest.fixture
def mine(base, tmp_path):
    """A copy of the tiny pipeline to spoil."""
    return shutil.copytree(base, tmp_path / "mine")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("changes, cause", [
    ({"size": 36}, "size must be divisible by 8"), ({"timestep": 1000}, "timestep"),
    ({"t_min": 500, "t_max": 400}, "t_min"), ({"t_max": 1000}, "t_max"),
    ({"guidance": -1.0}, "guidance"), ({"precision": "fp16"}, "precision"),
    ({"store": "fp16"}, "store"), ({"clip": 0.0}, "clip")])
def test_values_that_make_no_sense_are_refused_by_name(changes, cause):
    assert cause in refused(problem.make, "tiny", **changes)


@pytest.mark.parametrize("name", ["", "somebody/something", "no/such/place", "./nothing"])
def test_without_network_or_local_model_the_files_and_the_flag_are_named(offline, tmp_path, name):
    preset, changes = ("tiny", {"model": name}) if name else ("full", {})
    line = refused(problem.make, preset, **changes)
    assert "--model" in line and "unet/diffusion_pytorch_model.safetensors" in line
    assert "text_encoder_2/model.safetensors" in line and "tokenizer_2/" in line


def test_a_run_without_a_model_writes_nothing(offline, tmp_path):
    refused(degrade.main, ["sdxl", "--preset", "full", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "model_index.json",
                                  "scheduler/scheduler_config.json"])
def test_a_folder_that_lacks_a_file_is_refused_naming_it(mine, file):
    (mine / file).unlink()
    line = refused(problem.make, "tiny", model=str(mine))
    assert file in line and str(mine) in line and "unet/config.json" not in line


def test_a_model_that_is_not_sdxl_is_refused(mine):
    edit(mine / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "not SDXL but StableDiffusionPipeline" in refused(
        problem.make, "tiny", model=str(mine))
    edit(mine / "model_index.json", _class_name="StableDiffusionXLPipeline")
    edit(mine / "unet" / "config.json", addition_embed_type=None)
    assert "not SDXL" in refused(problem.make, "tiny", model=str(mine))


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_scheduler_that_does_not_predict_epsilon_is_refused(mine, kind):
    edit(mine / "scheduler" / "scheduler_config.json", prediction_type=kind)
    assert kind in refused(problem.make, "tiny", model=str(mine))


def test_weights_that_are_not_the_unets_are_refused_naming_the_file(mine):
    file = mine / model.WEIGHTS[0]
    whole = file.read_bytes()
    for spoilt in (whole[:-100], b"", b"weights"):
        file.write_bytes(spoilt)
        assert str(file) in refused(problem.make, "tiny", model=str(mine))
    shutil.copy(mine / "vae" / "diffusion_pytorch_model.safetensors", file)
    assert "does not hold this UNet" in refused(problem.make, "tiny", model=str(mine))


@pytest.mark.parametrize("content, cause", [
    (b"", "is empty"), (b" \n\n\t\n", "is empty"), (b"a dog\na caf\xe9\n", "not UTF-8 at byte 11"),
    (None, "cannot be read")])
def test_prompts_that_cannot_be_read_are_refused(tmp_path, content, cause):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    line = refused(problem.make, "tiny", prompts=str(file))
    assert cause in line and str(file) in line


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


def test_a_path_of_another_teacher_size_or_prompts_is_refused(mine, prompts, tmp_path):
    argv = ["sdxl", "--prompts", str(prompts), "--out", str(tmp_path / "run")]
    degrade.main([*argv, *SMALL])
    held = sorted((tmp_path / "run").rglob("*"))
    assert "size" in refused(backtrack.main, [*argv, "--size", "40"])
    assert "prompts_sha256" in refused(backtrack.main, ["sdxl", "--out", str(tmp_path / "run")])
    weights = disback.load_file(mine / model.WEIGHTS[0])
    disback.save_tensors(mine / model.WEIGHTS[0], {k: 2 * w for k, w in weights.items()})
    assert "model_sha256" in refused(backtrack.main, [*argv, "--model", str(mine)])
    assert sorted((tmp_path / "run").rglob("*")) == held


def test_what_generate_cannot_use_is_refused(offline, base, tmp_path):
    (tmp_path / "run").mkdir()
    assert "backtrack.py" in refused(generate.load, str(tmp_path / "run"), str(base))
    line = refused(generate.load, "SYZhang0805/DisBack", str(base))
    assert "SDXL_DisBack.bin" in line and "--student" in line
    for content in (b"", b"weights", b"\x80\x04\x95"):
        (tmp_path / "w.bin").write_bytes(content)
        assert "w.bin" in refused(generate.load, str(tmp_path / "w.bin"), str(base))
    torch.save({"unet": torch.zeros(3)}, tmp_path / "w.bin")
    assert "w.bin" in refused(generate.load, str(tmp_path / "w.bin"), str(base))
    for flags in (["--batch", "0"], ["--seeds", "-1"], ["--steps", "2"], ["--sceds", "1"], []):
        argv = [*(["a dog"] if flags else []), *flags]
        assert refused(generate.main, [*argv, "--out", str(tmp_path / "images")])
    assert not (tmp_path / "images").exists()


def test_code_in_a_file_of_weights_is_not_run(base, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "bomb.bin")
    assert "bomb.bin" in refused(generate.load, str(tmp_path / "bomb.bin"), str(base))
    assert not (tmp_path / "ran").exists()


def test_help_names_the_fields_and_a_dry_run_writes_nothing(capsys, tmp_path):
    for flags, words in ((["--help"], "--guidance"), (["--dry-run"], "AdamW")):
        with pytest.raises(SystemExit) as ended:
            degrade.main(["sdxl", "--out", str(tmp_path / "run"), *flags])
        assert not ended.value.code and words in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
