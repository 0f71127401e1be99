"""SDXL with LoRA adapters: one base, four sets of adapters; skipped where peft is not installed."""

import copy
import functools
import runpy
import shutil
import sys
from importlib import metadata

import pytest
import torch
from conftest import make, refusal, same, save_of_few_tensors
from diffusers import UNet2DConditionModel
from processes import stages, two_ranks
from safetensors.torch import load_file

import backtrack
import degrade
import sdxl
from runtime import files
from sdxl import assembly, layout, memory, model, problem, tiny

SMALL = ["sdxl", "--rank", "4", "--log-every", "50"]


@pytest.fixture(autouse=True)
def two_prompts(tmp_path, monkeypatch):
    (tmp_path / "two.txt").write_text("a dog\na cat\n")
    monkeypatch.setattr(assembly.text, "SHIPPED", tmp_path / "two.txt")
    monkeypatch.setattr(assembly, "SHOWN", 3)
    monkeypatch.setattr(assembly, "sample", functools.partial(assembly.sample, steps=2))


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def test_without_peft_a_rank_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(layout, "find", lambda *_: pytest.fail("it looked for the model"))
    assert "--rank needs peft: pip install" in refusal(make, problem, "tiny", rank=4)
    unet = tiny.unet()  # as a benchmark asks for adapters
    assert "--rank needs peft: pip install" in refusal(model.adapt, unet, 4)
    assert all(p.requires_grad for p in unet.parameters())


def test_a_peft_that_diffusers_cannot_import_is_named(monkeypatch):
    """It would fail in diffusers' words, whether a rank is asked for or not."""
    monkeypatch.setattr(metadata, "version", {"peft": "0.17.1"}.get)
    with pytest.raises(ImportError, match="peft 0.17.1 is too old: pip install -U 'peft>="):
        runpy.run_path(sdxl.__file__)
    monkeypatch.setattr(metadata, "version", {"peft": "0.18.0"}.get)
    runpy.run_path(sdxl.__file__)


def test_adapters_start_as_nothing_and_are_all_that_is_trained_and_saved(peft):
    whole, lora = make(problem, "tiny"), make(problem, "tiny", rank=4, precision="bf16")
    assert sum(p.numel() for p in trained(lora.teacher)) == memory.adapter_parameters(
        tiny.unet(), 4) == sum(t.numel() for t in lora.teacher.state_dict().values())
    assert {p.dtype for p in trained(lora.teacher)} == {torch.float32}
    assert lora.teacher.unet.conv_in.weight.dtype == torch.bfloat16
    assert lora.about["precision"] == "bf16" and "precision" not in whole.about
    exact = make(problem, "tiny", rank=4).teacher
    z, cond = whole.sample_inputs(2)
    sigma = whole.sample_sigma(2)
    with torch.no_grad():
        torch.testing.assert_close(exact(z, sigma, cond), whole.teacher(z, sigma, cond))


def test_adapters_start_alike_whatever_the_seed_and_leave_the_random_state_alone(peft):
    made = [tiny.unet(), tiny.unet()]
    for seed, unet in enumerate(made):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model.adapt(unet, 4)
        assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(trained(made[0]), trained(made[1])))
    assert pairs and all(torch.equal(one, other) for one, other in pairs)
    assert any(one.abs().max() > 0 for one, _ in pairs)


def test_what_adapters_add_is_their_product(peft):
    """Their scale, alpha / rank, is 1: what the learning rate of `lora` was chosen for."""
    unet = model.adapt(tiny.unet(), 4)
    layer = unet.get_submodule(NAME.removesuffix(".weight"))
    a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.weight
    x = torch.randn(3, w.shape[1])
    with torch.no_grad():
        b.normal_()
        torch.testing.assert_close(layer(x), x @ (w + b @ a).T)


def test_copies_share_the_base_and_a_switch_moves_the_target_only(peft, tmp_path):
    made = make(problem, "tiny", rank=4)
    target, fake = made.teacher, copy.deepcopy(made.teacher)
    one, other = dict(target.named_parameters()), dict(fake.named_parameters())
    for name, parameter in one.items():
        shared = parameter.data_ptr() == other[name].data_ptr()
        assert shared == (not parameter.requires_grad), name
    with torch.no_grad():
        for parameter in trained(fake):
            parameter.normal_()
    files.save_tensors(tmp_path / "node.safetensors", fake.state_dict())
    z, cond = made.sample_inputs(2)
    sigma = made.sample_sigma(2)
    with torch.no_grad():
        before = target(z, sigma, cond), fake(z, sigma, cond), made.student(z, sigma, cond)
        files.load_net(tmp_path / "node.safetensors", target)
        for parameter in trained(fake):
            parameter.zero_()
        after = target(z, sigma, cond), fake(z, sigma, cond), made.student(z, sigma, cond)
    torch.testing.assert_close(after[0], before[1])  # the target is the node, the fake is not
    torch.testing.assert_close(after[1], before[0])
    assert torch.equal(after[2], before[2])


def test_both_stages_run_resume_and_serve_the_sum_of_base_and_adapters(
        peft, tmp_path, monkeypatch, cut_off):
    out, cut = tmp_path / "run", tmp_path / "cut"
    degrade.main([*SMALL, "--out", str(out), "--steps", "2", "--nodes", "2"])
    shutil.copytree(out / "path", cut / "path")
    argv = [*SMALL, "--interval", "2", "--save-every", "2", "--fake-updates", "1", "--steps", "3"]
    backtrack.main([*argv, "--out", str(out)])
    monkeypatch.setattr("sdxl.figures.draw", lambda *args: None)
    cut_off(2 * 2 + 1, backtrack.main, [*argv, "--out", cut])
    backtrack.main([*argv, "--out", str(cut), "--resume"])
    assert same(out, cut)
    made = make(problem, "tiny", rank=4)
    files.load_net(out / "student.safetensors", made.student)
    served = UNet2DConditionModel.from_pretrained(out / "student" / "unet")
    plain = make(problem, "tiny").student
    assert served.state_dict().keys() == plain.unet.state_dict().keys()
    plain.unet.load_state_dict(served.state_dict())
    z, cond = made.sample_inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(made.generate(plain, z, cond),
                                   made.generate(made.student, z, cond), rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.unet.state_dict()[NAME], make(
        problem, "tiny").student.unet.state_dict()[NAME])
    for rank in ("0", "8"):
        assert f"rank 4, not {rank}" in refusal(backtrack.main, [
            "sdxl", "--rank", rank, "--out", str(tmp_path / "full"), "--path", str(out / "path")])
    assert not list((tmp_path / "full").rglob("*.safetensors"))


NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v.weight"


def test_sharded_adapters_learn_what_accumulation_does_on_one_rank_and_resume(
        peft, tmp_path, monkeypatch):
    """Of a UNet of few tensors. What is frozen is in no file, and in shards all the same."""
    monkeypatch.setattr("sdxl.figures.draw", lambda *args: None)
    save_of_few_tensors(tmp_path / "model")
    flags = ["sdxl", "--rank", "2", "--model", str(tmp_path / "model"), "--prompts",
             str(tmp_path / "two.txt"), "--batch", "2", "--save-every", "1"]
    record = ["degrade", *flags, "--nodes", "2", "--steps", "2"]
    walk = ["backtrack", *flags, "--interval", "1", "--fake-updates", "2", "--steps"]
    two, one = tmp_path / "two", tmp_path / "one"
    said, codes = two_ranks(stages(
        [*record, "--shard", "--out", two], [*walk, 1, "--shard", "--out", two],
        [*walk, 2, "--shard", "--resume", "--out", two],
        first="from sdxl import figures; figures.draw = lambda *args: None"))
    assert codes == [0, 0], said
    degrade.main([*record[1:], "--accumulate", "2", "--out", str(one)])
    backtrack.main([*walk[1:], "2", "--accumulate", "2", "--out", str(one)])
    for name in ("path/02.safetensors", "student.safetensors"):
        found, expected = load_file(two / name), load_file(one / name)
        assert found.keys() == expected.keys()
        found, expected = (torch.cat([weight.flatten().float() for weight in state.values()])
                           for state in (found, expected))
        assert (found - expected).norm() < 1e-2 * expected.norm(), name
