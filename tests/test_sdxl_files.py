"""SDXL's files as diffusers and other tools write them: taken exactly, or refused by name."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from conftest import edit, make, refusal, same
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from runtime import files
from sdxl import generate, layout, model, problem, settings, text

KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
         "text_encoder_2": CLIPTextModelWithProjection}


def rewritten(folder, part, **how):
    """The part's weights, written by diffusers' own save_pretrained in another way."""
    net = KINDS[part].from_pretrained(folder / part)
    for file in layout.weights(folder, part)[0]:
        file.unlink()
    net.save_pretrained(folder / part, **how)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_parts_in_shards_are_those_in_one_file_in_fp16_as_well(base, mine, variant):
    for part in KINDS:
        rewritten(mine, part, variant=variant, max_shard_size="60KB")
    assert layout.find(str(mine), mine) == mine
    assert len(layout.weights(mine, "unet")[0]) > 2
    for part, kind in KINDS.items():
        assert same(*(model.load_part(kind, folder, part).state_dict() for folder in (mine, base)))
    bank = text.embed(mine, ["a dog"], mine)
    assert torch.equal(bank["text"], text.embed(base, ["a dog"], mine / "other")["text"])
    assert "261,684 parameters" in problem.dry_run(settings.Config(model=str(mine)))


def test_fp16_is_taken_only_where_there_is_no_fp32(base, mine):
    whole = load_file(layout.weights(base, "unet")[0][0])
    half = {name: (2 * weight).half() for name, weight in whole.items()}
    save_file(half, mine / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(model.load_part(UNet2DConditionModel, mine, "unet").conv_in.weight,
                       model.load_part(UNet2DConditionModel, base, "unet").conv_in.weight)
    layout.weights(mine, "unet")[0][0].unlink()
    found = model.load_part(UNet2DConditionModel, mine, "unet")
    assert torch.equal(found.conv_in.weight, half["conv_in.weight"].float())


def test_weights_that_are_there_whole_and_in_shards_are_all_looked_at(mine):
    for part, variant in (("text_encoder", None), ("unet", "fp16")):
        whole = layout.weights(mine, part)[0]
        held = whole[0].read_bytes()
        rewritten(mine, part, variant=variant, max_shard_size="60KB")
        shards = layout.weights(mine, part)[0]
        whole[0].write_bytes(held)  # which transformers prefers to shards, and fp32 is to fp16
        assert layout.weights(mine, part) == (
            sorted({*whole, *(() if variant else shards)}), None)
        whole[0].write_bytes(held[:-9])
        assert f"{whole[0]} is broken" in refusal(layout.find, str(mine), mine)
        whole[0].write_bytes(held)


def test_an_index_without_its_shards_beside_a_whole_file_is_told_to_be_in_the_way(base, mine):
    for part in ("text_encoder", "unet"):  # diffusers heeds it, transformers does not
        whole = layout.weights(mine, part)[0][0]
        rewritten(mine, part, max_shard_size="60KB")
        for shard in layout.weights(mine, part)[0]:
            shard.unlink()
        shutil.copy(base / part / whole.name, whole)
        if part == "text_encoder":
            assert layout.find(str(mine), mine) == mine
    line = refusal(layout.find, str(mine), mine)
    index = mine / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    assert f"{index} is left of shards that are not here, and diffusers heeds it: remove it" in line
    index.unlink()
    assert layout.find(str(mine), mine) == mine


def test_what_is_to_be_saved_again_is_of_a_part_that_is_read(mine):
    for part, stem in layout.PARTS.items():
        (mine / part / f"{stem}.bin").touch()
    (mine / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for parts, file in ((layout.AROUND_UNET, "vae/"), (layout.PARTS, "unet/")):
        line = refusal(layout.find, str(mine), mine, "--base", parts)
        assert f"{file}diffusion_pytorch_model.bin is to be saved again" in line


def test_weights_of_several_types_are_all_float32_and_too_large_ones_are_refused(base, mine):
    for part, dtype in (("unet", torch.float16), ("vae", torch.bfloat16),
                        ("text_encoder", torch.float64)):
        (file,) = layout.weights(mine, part)[0]
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("bias"))
        save_file(weights | {name: weights[name].to(dtype)}, file, {"format": "pt"})
        net = model.load_part(KINDS[part], mine, part)
        assert {w.dtype for w in net.parameters()} == {torch.float32}
        save_file(weights | {name: weights[name].double() + 1e300}, file, {"format": "pt"})
        assert "not finite" in refusal(model.load_part, KINDS[part], mine, part)


def test_shards_of_fp16_under_their_former_names_are_read(base, mine):
    rewritten(mine, "unet", variant="fp16", max_shard_size="60KB")
    index = mine / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    said = index.read_text()
    for file in layout.weights(mine, "unet")[0]:
        stem, _, number = file.stem.partition(".fp16")
        file.rename(file.with_name(f"{stem}{number}.fp16.safetensors"))
        said = said.replace(file.name, f"{stem}{number}.fp16.safetensors")
    index.write_text(said)
    assert layout.find(str(mine), mine) == mine
    assert same(*(model.load_part(KINDS["unet"], folder, "unet").state_dict()
                  for folder in (mine, base)))


def test_a_shard_that_is_missing_or_cut_is_found_before_anything_is_computed(mine):
    rewritten(mine, "unet", max_shard_size="500KB")
    shard = layout.weights(mine, "unet")[0][1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    assert f"{shard} is broken" in refusal(layout.find, str(mine), mine)
    shard.rename(shard.with_name(f"{layout.PARTS['unet']}-00002-of-00009.safetensors"))  # astray
    assert f"lacks unet/{shard.name}: --model takes" in refusal(layout.find, str(mine), mine)
    assert shard.name in refusal(model.load, mine)
    index = mine / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for broken in ("{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}'):
        index.write_text(broken)
        assert str(index) in refusal(layout.find, str(mine), mine)
        assert str(index) in refusal(model.load, mine)


CHANGES = {
    "not finite": lambda weights, name: weights[name].view(-1)[0].fill_(torch.nan),
    "type I8": lambda weights, name: weights.update({name: weights[name].to(torch.int8)}),
    "type C64": lambda weights, name: weights.update({name: weights[name].to(torch.complex64)}),
    "missing_keys": lambda weights, name: weights.pop(name),
    "unexpected_keys": lambda weights, name: weights.update(more=torch.zeros(1)),
    "mismatched_keys": lambda weights, name: weights.update({name: torch.zeros(5, 5)}),
    "_orig_mod": lambda weights, name: weights.update(
        {"_orig_mod." + n: weights.pop(n) for n in list(weights)})}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])  # of diffusers and transformers
def test_each_part_of_a_pipeline_is_loaded_strictly(mine, part, change):
    (file,), _ = layout.weights(mine, part)
    weights = load_file(file)
    CHANGES[change](weights, sorted(weights)[0])
    save_file(weights, file)
    line = refusal(model.load_part, KINDS[part], mine, part)
    assert str(file) in line and "does not hold this" in line
    assert change in line or change == "_orig_mod"
    assert change != "mismatched_keys" or sorted(weights)[0] in line
    if change == "_orig_mod" and part == "vae":
        assert "'_orig_mod." in line


@pytest.mark.parametrize("change, cause", [
    ("not finite", "not finite: conv_in.bias"), ("type I8", "conv_in.bias [16] torch.int8"),
    ("_orig_mod", "no conv_in.weight, but ['_orig_mod.add_embedding")])
def test_a_students_file_is_loaded_strictly(base, tmp_path, change, cause):
    weights = load_file(layout.weights(base, "unet")[0][0])
    CHANGES[change](weights, "conv_in.bias")
    for save, file in ((save_file, tmp_path / "one.safetensors"), (torch.save, tmp_path / "w.bin")):
        save(weights, file)
        line = refusal(generate.load, str(file), str(base))
        assert str(file) in line and cause in line


def test_names_with_the_prefix_of_a_node_are_taken_if_all_have_it(base, tmp_path):
    weights = load_file(layout.weights(base, "unet")[0][0])
    config = files.load_json(base / "unet" / "config.json", "")
    prefixed = {"unet." + name: weight for name, weight in weights.items()}
    save_file(prefixed, tmp_path / "all.safetensors")
    def load(file):
        return model.load_unet(config, model.read_unet(file), file)

    load(tmp_path / "all.safetensors")
    save_file(prefixed | {"conv_in.bias": torch.zeros(16)}, tmp_path / "two.safetensors")
    assert "unet." in refusal(load, tmp_path / "two.safetensors")


@pytest.mark.parametrize("what", ["file", "gone.safetensors", "owner/gone.safetensors", "here/gone",
                                  "runs/gone", "./gone", "/no/where", "a/b/c", "gone", "~/no/where",
                                  "-owner/name", ""])
def test_the_hub_is_never_asked_for_what_is_meant_as_a_place_here(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("weights")
    (tmp_path / "here").mkdir()

    def asked(*args, **keywords):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(layout, "snapshot_download", asked)
    monkeypatch.setattr(generate, "snapshot_download", asked)
    line = refusal(layout.find, what, tmp_path, "--base") if what else ""
    assert not what or "--base" in line
    if what == "file":
        assert "single file: if it is a whole checkpoint" in line and "from_single_file" in line
    else:
        line = refusal(generate.load, what or "runs/sdxl")
        assert (what or "runs/sdxl") in line and "--student" in line


def hub(there, offered, here, asked):
    """A hub's snapshot_download, of which huggingface's own filter lets through what is copied."""
    def snapshot(name, allow_patterns):
        asked.append(name)
        for file in huggingface_hub.utils.filter_repo_objects(
                offered, allow_patterns=allow_patterns):
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / file, here / file)
        return here

    return snapshot


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("unet", [True, False])
def test_the_hub_is_asked_for_what_is_read_and_no_more_in_fp32_and_then_in_fp16(
        base, mine, monkeypatch, variant, unet):
    for part in KINDS:
        rewritten(mine, part, variant=variant)
    needed = {str(file.relative_to(mine)) for file in mine.rglob("*") if file.is_file()}
    needed |= {"tokenizer/vocab.json", "tokenizer_2/merges.txt"}
    more = {"sd_xl_base_1.0.safetensors", "unet/model.onnx", "vae/diffusion_flax_model.msgpack",
            "text_encoder_2/model.onnx_data", "vae_1_0/config.json"}
    if not variant:
        more |= {"unet/diffusion_pytorch_model.fp16.safetensors",
                 "text_encoder/model.fp16.safetensors"}
    offered = needed | more
    for file in offered:
        (mine / file).parent.mkdir(exist_ok=True)
        (mine / file).touch()
    asked, got = [], mine.parent / "got"

    monkeypatch.setattr(layout, "snapshot_download", hub(mine, offered, got, asked))
    parts = layout.PARTS
    if not unet:  # as around a student's
        parts = layout.AROUND_UNET
        needed = {file for file in needed if not file.startswith("unet/diffusion")}
    assert layout.find("owner/name-1.0", mine, "--base", parts) == got
    assert asked == ["owner/name-1.0"] * (3 if variant else 2)  # first without weights
    assert {str(file.relative_to(got)) for file in got.rglob("*") if file.is_file()} == needed
    assert layout.weights(got, "vae")[1] == variant


@pytest.mark.parametrize("name, change, cause", [
    ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
     "not SDXL but StableDiffusionXLImg2ImgPipeline"),
    ("unet/config.json", {"in_channels": 9}, "in_channels 9"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("vae/config.json", {"latent_channels": 16}, "not SDXL's 4 channels")])
@pytest.mark.parametrize("flag", ["--model", "--base"])
def test_of_another_kind_of_model_the_hub_gives_no_weights(
        base, mine, tmp_path, monkeypatch, flag, name, change, cause):
    edit(mine / name, **change)
    offered = [str(file.relative_to(mine)) for file in mine.rglob("*") if file.is_file()]
    if "_class_name" in change:  # the refiner has one text encoder
        offered = [file for file in offered if not file.startswith("text_encoder/")]
    got = tmp_path / "got"

    monkeypatch.setattr(layout, "snapshot_download", hub(mine, offered, got, []))
    if flag == "--model":
        line = refusal(make, problem, "tiny", model="owner/name")
    else:
        unet = base / "unet" / "diffusion_pytorch_model.safetensors"
        line = refusal(generate.load, str(unet), "owner/name")
    assert cause in line
    assert got.is_dir() and not list(got.rglob("*.safetensors"))


@pytest.mark.parametrize("field, value", [
    ("timestep", 5000), ("timestep", -1), ("timestep", 399.0), ("timestep", "399"),
    ("timestep", True), ("timestep", float("nan")), ("size", 0), ("size", 33), ("size", -8),
    ("size", 1e9), ("size", 8 * 10**9), ("size", None), ("base", 7), ("base", ["a"]),
    ("base", ...), ("size", ...)])
def test_a_students_numbers_are_checked_when_they_are_read(tmp_path, field, value):
    file = tmp_path / "student" / "disback.json"
    file.parent.mkdir()
    about = {"base": "", "timestep": 399, "size": 32, field: value}
    file.write_text(json.dumps({k: v for k, v in about.items() if v is not ...}))
    line = refusal(generate.load, str(tmp_path))
    assert str(file) in line and (field in line or "NaN" in line)


def test_a_file_that_is_no_students_is_refused_before_the_base_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(layout, "find", lambda *_: pytest.fail("it looked for the base"))
    (tmp_path / "text.bin").write_text("mine")
    save_file({"model.weight": torch.zeros(1)}, tmp_path / "digits.safetensors")
    for name in ("text.bin", "digits.safetensors"):
        assert f"{name} holds no weights of a UNet" in refusal(generate.load, str(tmp_path / name))


def test_a_picture_that_is_not_finite_is_not_drawn(base, tmp_path):
    """Finite weights, whose answers overflow."""
    weights = load_file(layout.weights(base, "unet")[0][0])
    weights["conv_out.weight"].fill_(3e38)
    save_file(weights, tmp_path / "large.safetensors")
    line = refusal(generate.main, ["a dog", "--student", str(tmp_path / "large.safetensors"),
                                   "--base", str(base), "--out", str(tmp_path / "images")])
    assert "a picture is not finite" in line and not (tmp_path / "images").exists()


def test_embeddings_that_are_not_finite_are_not_kept(mine, tmp_path):
    (file,), _ = layout.weights(mine, "text_encoder")
    weights = load_file(file)
    for name in weights:
        if name.endswith("mlp.fc2.weight"):
            weights[name].fill_(3e38)
    save_file(weights, file)
    assert "not finite" in refusal(text.embed, mine, ["a dog"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("broken", [
    None, {"text": torch.full((1, 77, 32), torch.nan), "pooled": torch.zeros(1, 16)},
    {"text": torch.zeros(2, 77, 32), "pooled": torch.zeros(1, 16)}, {"text": torch.zeros(1)}])
def test_kept_embeddings_that_were_cut_off_or_cannot_be_are_to_be_removed(
        base, mine, tmp_path, broken):
    (mine / "tokenizer" / "folder").mkdir()  # is not read
    text.embed(mine, ["a dog"], tmp_path)
    (file,) = tmp_path.glob("sdxl-text-*")
    if broken:
        files.save_tensors(file, broken)
    else:
        file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is broken: remove it" in refusal(text.embed, base, ["a dog"], tmp_path)


def test_a_pipeline_that_diffusers_saves_again_is_the_same_model(base, mine):
    """Its files' hash says so, though it was read and written."""
    StableDiffusionXLPipeline.from_pretrained(base).save_pretrained(mine / "again")
    assert [files.sha256(file) for file in layout.read(base)][6:] == [
        files.sha256(file) for file in layout.read(mine / "again")][6:]
