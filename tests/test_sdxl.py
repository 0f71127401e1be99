"""SDXL on a tiny random pipeline: the wrapper, guidance and text against diffusers; both stages."""

import copy
import functools
import inspect
import re
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, edit, forwards, make, read, refusal, same
from diffusers import (
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import backtrack
import degrade
import disback
from runtime import files, folder, optimizers
from sdxl import assembly, figures, generate, memory, model, problem, settings, text
from sdxl import tiny as tiny_pipeline

CLIP = 0.01  # below every gradient's norm
SMALL = ["--log-every", "50", "--clip", str(CLIP)]
BACKTRACK = [*SMALL, "--save-every", "2", "--steps", "3", "--interval", "2",
             "--fake-updates", "2"]


@pytest.fixture(scope="module", autouse=True)
def three_prompts(tmp_path_factory):
    """Three prompts in place of the 200 that are shipped, and smaller figures, for speed."""
    file = tmp_path_factory.mktemp("prompts") / "three.txt"
    file.write_text("A photo of a dog.\n\nthe thin man in the inn\na café\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "SHIPPED", file)
        patch.setattr(assembly, "SHOWN", 3)
        patch.setattr(assembly, "sample", functools.partial(assembly.sample, steps=3))
        yield


@pytest.fixture(scope="module")
def tiny():
    return make(problem, "tiny")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A finished run of both stages, and what was seen of it: each stage's forwards, the norms of
    its gradients, the sheets of its figures, and the teacher after they were drawn."""
    out, norms, sheets, teachers = tmp_path_factory.mktemp("run"), [], {}, []
    argv, sheet, draw = ["sdxl", "--out", out], figures.sheet, figures.draw

    def look(adam, *_):
        weights = [weight for group in adam.param_groups for weight in group["params"]]
        norms.append(sum(weight.grad.square().sum().item() for weight in weights) ** 0.5)

    def note(file, title, rows, prompts):
        sheets[file.name] = rows, prompts
        sheet(file, title, rows, prompts)

    def drawn(out, path, compare, vae, teacher, *rest):
        draw(out, path, compare, vae, teacher, *rest)
        teachers.append(copy.deepcopy(teacher.state_dict()))

    hook, batch = register_optimizer_step_post_hook(look), (2, 4)  # guided, it is twice the batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "sheet", note)
        patch.setattr(figures, "draw", drawn)
        evals = [forwards(UNet2DConditionModel, batch, stage.main, [*argv, *flags]) for stage, flags
                 in ((degrade, [*SMALL, "--steps", 4, "--nodes", 2]), (backtrack, BACKTRACK))]
    hook.remove()
    return SimpleNamespace(out=out, evals=evals, norms=norms, sheets=sheets,
                           teachers=teachers)


@pytest.fixture(scope="module")
def run(watched):
    """That run's folder."""
    return watched.out


@pytest.fixture(scope="module")
def pipe(base):
    """The tiny pipeline as diffusers has it."""
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def full_unet():
    return memory.on_meta(memory.BASE)


@pytest.fixture(scope="module")
def dry_runs(full_unet):
    """The tables of `full` and of `lora`, for which the same UNet is walked through but once."""
    walked = functools.cache(memory.activations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "on_meta", lambda config: full_unet)
        patch.setattr(memory, "activations", walked)
        return {
            **{name: problem.dry_run(problem.PRESETS[name]) for name in ("full", "lora")},
            "no average": problem.dry_run(replace(problem.PRESETS["full"], ema=0))}


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *args: None)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---------------------------------------------------------------------- against formulas, diffusers


def test_one_step_is_what_diffusers_published_snippet_makes(tiny, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", LCMScheduler.from_config(pipe.scheduler.config))
    z, cond = tiny.sample_inputs(3)
    prompts = text.read_prompts(text.SHIPPED)
    theirs = pipe(prompt=[prompts[i] for i in cond["prompt"]], num_inference_steps=1,
                  guidance_scale=0, timesteps=[399], latents=z, output_type="latent").images
    with torch.no_grad():
        ours = tiny.generate(tiny.student, z, cond)
    assert relative(ours, theirs) <= 1e-6


def alphas_bar():
    """By the schedule's definition, float64 [1000]."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.tensor(np.cumprod(1 - betas))


def sigma_table():
    return ((1 - alphas_bar()) / alphas_bar()).sqrt().float()


@pytest.mark.parametrize("t", [0, 20, 399, 980, 999])
def test_the_wrapper_is_the_epsilon_formula(tiny, t):
    """In float64: (x_vp - sqrt(1 - abar) eps) / sqrt(abar)."""
    abar = alphas_bar()[t]
    unet = copy.deepcopy(tiny.teacher.unet).double()
    net = model.Denoiser(unet, sigma_table().double(), 32)
    torch.manual_seed(t)
    x_vp = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    cond = {"text": torch.randn(2, 77, 32).double(), "pooled": torch.randn(2, 16).double()}
    added = {"text_embeds": cond["pooled"],
             "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 2).double()}
    with torch.no_grad():
        eps = unet(x_vp, t, cond["text"], added_cond_kwargs=added).sample
        sigma = ((1 - abar) / abar).sqrt().view(1, 1, 1, 1)
        ours = net(x_vp / abar.sqrt(), sigma, cond)
    assert relative(ours, (x_vp - (1 - abar).sqrt() * eps) / abar.sqrt()) <= 1e-12


def test_sigma_of_each_timestep_is_read_from_the_schedulers_config(base):
    _, sigmas = model.load(base)
    torch.testing.assert_close(sigmas, sigma_table(), rtol=1e-4, atol=0)
    assert sigmas[399].item() == pytest.approx(1.16057, rel=1e-5)


def test_a_sigma_takes_the_timestep_that_is_nearest_in_its_logarithm(tiny):
    sigmas, seen = sigma_table(), []
    hook = tiny.teacher.unet.register_forward_pre_hook(lambda net, args: seen.append(args[1]))
    z, cond = tiny.sample_inputs(3)
    between = (sigmas[0] * sigmas[1]).sqrt() * 1.005  # nearer to the first in its own value
    sigma = torch.stack([sigmas[7] * 1.0001, between, torch.tensor(99.0)])
    try:
        tiny.teacher(z, sigma.view(3, 1, 1, 1), cond)
    finally:
        hook.remove()
    assert isinstance(seen[0], torch.Tensor) and seen[0].tolist() == [7, 1, 999]


def test_the_target_is_guided_by_8_in_one_call_as_in_two(tiny):
    z, cond = tiny.sample_inputs(3)
    cond = {name: cond[name].double() for name in ("text", "pooled")}
    x, sigma = 3 * z.double(), tiny.sample_sigma_vsd(3).double()
    nothing = {name: torch.zeros_like(value) for name, value in cond.items()}
    teacher, calls = copy.deepcopy(tiny.teacher).double(), []  # float32 rounds 8 differences

    def net(*args):
        calls.append(args)
        return teacher(*args)

    with torch.no_grad():
        ours = tiny.guide(net, x, sigma, cond)
        assert len(calls) == 1
        u, c = teacher(x, sigma, nothing), teacher(x, sigma, cond)
        assert relative(model.guide(teacher, x, sigma, cond, 1.0), c) <= 1e-12
    assert relative(ours, u + 8 * (c - u)) <= 1e-12
    assert (c - u).abs().max() > 1e-3  # the prompt counts at all


def test_embeddings_are_those_of_diffusers_pipeline(base, pipe, tmp_path):
    prompts = 4 * ["a cat", "the " * 90, "", "a dog"] + ["A photo of a dog.", "naïve café"]
    bank = text.embed(base, prompts, tmp_path)
    assert len(bank["text"]) == len(bank["pooled"]) == 18  # of which 16 are encoded at a time
    for i in (0, 1, 2, 15, 16, 17):
        theirs = pipe.encode_prompt(prompts[i], do_classifier_free_guidance=False)
        assert relative(bank["text"][i:i + 1], theirs[0]) <= 1e-6
        assert relative(bank["pooled"][i:i + 1], theirs[2]) <= 1e-6
    kept = text.embed(base, prompts, tmp_path, torch.device("meta"))  # no file is read to that
    assert all(tensor.device.type == "meta" for tensor in kept.values())


def test_a_weight_of_one_over_sigma_squared_is_the_loss_of_the_predicted_noise(tiny):
    z, cond = tiny.sample_inputs(2)
    x0, sigma = z, tiny.sample_sigma(2)
    torch.manual_seed(1)
    ours = disback.score_matching_loss(tiny.teacher, x0, sigma, cond, tiny.score_weight(sigma))
    torch.manual_seed(1)
    eps = torch.randn_like(x0)
    t = (sigma_table() - sigma.view(2, 1)).abs().argmin(dim=1)
    added = {"text_embeds": cond["pooled"], "time_ids": torch.tensor([[32., 32, 0, 0, 32, 32]] * 2)}
    x_vp = (x0 + sigma * eps) / (1 + sigma**2).sqrt()
    predicted = tiny.teacher.unet(x_vp, t, cond["text"], added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, ((predicted - eps) ** 2).mean(), rtol=1e-4, atol=0)


def test_noise_levels_are_those_of_the_recipe(tiny):
    torch.manual_seed(0)
    sigmas = sigma_table()
    for sample, low, high in ((tiny.sample_sigma, 0, 999), (tiny.sample_sigma_vsd, 20, 980)):
        sigma = sample(100_000)
        assert sigma.shape == (100_000, 1, 1, 1)
        assert sigma.min().item() == pytest.approx(sigmas[low].item(), rel=1e-4)
        assert sigma.max().item() == pytest.approx(sigmas[high].item(), rel=1e-4)
        middle = sigmas[(low + high) // 2].item()
        assert (sigma <= middle).float().mean().item() == pytest.approx(0.5, abs=0.01)


# ------------------------------------------------------------------------------- both stages


def test_both_stages_run_and_the_target_ends_as_the_teacher(run, base, watched):
    """The teacher is itself again once the figures have drawn every node."""
    metrics = read(run / "metrics.json")
    assert metrics["problem"] == "sdxl" and metrics["preset"] == "tiny" and metrics["node"] == 0
    assert metrics["method"] == "disback" and metrics["latent_std"] > 0
    theirs = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
    assert same(run / "path" / "00.safetensors", {f"unet.{k}": w for k, w in theirs.items()})
    assert sorted(f.name for f in (run / "figures").iterdir()) == [
        "mismatch.png", "path.png", "student.png"]
    assert same(*watched.teachers, run / "path" / "00.safetensors")
    # Three networks and four moments of Adam.
    assert (run / "state.pt").stat().st_size == pytest.approx(7 * 4 * 261_684, rel=0.1)


def test_network_evals_are_the_forwards_and_backwards_that_are_made(watched):
    """The target is guided, which costs a forward more: 4k + 5 for each of 2 samples, 3 times."""
    stage1, stage2 = watched.evals
    assert read(watched.out / "metrics.json")["network_evals"] == {
        "stage1": stage1, "stage2": stage2, "total": stage1 + stage2}
    assert stage2 == 13 * 2 * 3


def test_every_gradient_is_cut_to_the_problems_norm(watched):
    assert watched.norms == pytest.approx([CLIP] * (4 + 3 * 3), rel=0.01)


class Watch(TorchDispatchMode):
    """Counts the host's waits for a tensor's value, and names what is computed in float64.
    Integers are left out: a file's bytes, on the host anyway."""

    def __init__(self):
        super().__init__()
        self.waits, self.doubles = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.waits += args[0].is_floating_point() or args[0].dtype == torch.bool
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.doubles.add(str(function))
        return made


@pytest.mark.parametrize("stage, flags", [
    (degrade, ["--nodes", "1", "--spacing", "linear"]),
    (backtrack, ["--interval", "9", "--fake-updates", "2", "--save-every", "50"])])
def test_the_loops_neither_wait_for_the_device_nor_compute_in_float64(
        run, tmp_path, no_figures, before_updates, stage, flags):
    """From the first update to the last of two iterations."""
    seen = []
    if stage is backtrack:
        shutil.copytree(run / "path", tmp_path / "path")
    with Watch() as watch:
        before_updates(lambda adam: seen.append((watch.waits, len(watch.doubles))))
        stage.main(["sdxl", "--out", str(tmp_path), *SMALL, *flags, "--steps", "2"])
    assert len(seen) == (2 if stage is degrade else 6) and len(set(seen)) == 1
    assert watch.waits > seen[0][0]  # a checkpoint and a line of the log at the end


def test_a_run_that_is_cut_off_resumes_to_the_same_bits(run, tmp_path, no_figures, cut_off):
    """Cut off in the last of three iterations, of 3 updates each; the second switched the target
    and saved a checkpoint."""
    shutil.copytree(run / "path", tmp_path / "path")
    argv = ["sdxl", "--out", str(tmp_path), *BACKTRACK]
    cut_off(2 * 3 + 2, backtrack.main, argv)
    torn = tmp_path / ".student.a1b2c3d4.unfinished"  # of an export that was killed
    (torn / "unet").mkdir(parents=True)
    backtrack.main([*argv, "--resume"])
    assert same(run, tmp_path) and not torn.exists()


@pytest.mark.parametrize("clip, left", [(0.5, [0.3, 0.4]), (10.0, [3.0, 4.0])])
def test_a_gradient_is_shortened_only_where_it_is_longer_than_the_limit(clip, left):
    net = torch.nn.Linear(2, 1, bias=False)
    adam = optimizers.adamw(net, settings.TINY, 1e-3, clip)
    (net.weight @ torch.tensor([3.0, 4.0])).sum().backward()
    adam.step()
    torch.testing.assert_close(net.weight.grad[0], torch.tensor(left), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- nodes


def test_a_node_is_half_the_teachers_size_and_its_difference_survives(tmp_path):
    """What bf16 weights would lose: differences of 1e-5 to weights of about 0.1, kept to 2^-8."""
    torch.manual_seed(0)
    teacher, node = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    with torch.no_grad():
        for ours, theirs in zip(node.parameters(), teacher.parameters()):
            ours.copy_(theirs + 1e-5 * torch.randn_like(theirs))
    files.save_tensors(tmp_path / "00.safetensors", teacher.state_dict())
    files.save_tensors(tmp_path / "01.safetensors", model.difference(node, teacher))
    loaded = torch.nn.Linear(64, 64)
    model.add_difference(tmp_path / "01.safetensors", loaded)
    exact, kept = node.weight - teacher.weight, loaded.weight - teacher.weight
    assert relative(kept, exact) < 2**-8
    assert relative(node.weight.bfloat16() - teacher.weight, exact) > 0.5  # what it is spared
    model.add_difference(tmp_path / "00.safetensors", loaded)
    assert torch.equal(loaded.weight, teacher.weight)
    whole, difference = ((tmp_path / f"0{i}.safetensors").stat().st_size for i in (0, 1))
    assert difference < 0.53 * whole


def test_after_a_switch_the_targets_weights_are_the_nodes(run, tiny):
    first = load_file(run / "path" / "00.safetensors")
    net, path = copy.deepcopy(tiny.teacher), disback.DegradationPath(
        run / "path", model.add_difference)
    held = [*net.parameters()]
    for node in (2, 1, 0):
        path.load(node, net)
        added = load_file(path.files[node]) if node else {}
        for name, weight in net.state_dict().items():
            expected = first[name] + added["minus_teacher." + name].float() if node else first[name]
            assert torch.equal(weight, expected), name
    assert all(old is new for old, new in zip(held, net.parameters()))  # in place


def test_a_disk_without_room_for_the_path_is_refused_before_anything_is_written(
        tmp_path, monkeypatch):
    # Node 0; 2N differences of 2 bytes; a checkpoint, weights and two moments, and the next.
    free = 10**7 + 261_684 * 4 + 2 * 1 * 261_684 * 2 + 2 * 3 * 261_684 * 4 - 10_000
    asked, run = [], tmp_path / "run"  # which may be a mount point of its own
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: (
        asked.append(place) or SimpleNamespace(free=free)))
    argv = ["sdxl", "--out", str(run), *SMALL, "--steps", "2", "--nodes", "1"]
    needs, _, _ = refusal(degrade.main, argv).partition(" GB of free space")
    assert float(needs.split()[-1]) > 0
    assert [file.name for file in run.iterdir()] == [".disback.lock"]
    free += 20_000
    degrade.main(argv)
    assert (run / "path" / "path.json").exists()
    # Twice at the start and once the problem is known; a cache is asked as well where it is empty.
    assert [place for place in asked if place in (tmp_path, run)] == [tmp_path, run, run, run]


# ------------------------------------------------------------------------------------- serving


def test_the_student_is_saved_in_two_forms_that_load_to_the_same_bits(run, base):
    one = UNet2DConditionModel.from_pretrained(run / "student" / "unet")
    other = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
    other.load_state_dict(torch.load(run / "student" / generate.WEIGHTS, weights_only=True))
    for unet in (one, other):
        assert same(run, {f"unet.{name}": value for name, value in unet.state_dict().items()})
    theirs = UNet2DConditionModel.load_config(base / "unet")
    assert {**one.config, "_name_or_path": None} == {**theirs, "_name_or_path": None}
    about = read(run / "student" / "disback.json")
    steps = read(run / "metrics.json")["steps"]
    assert about == {"base": "", "timestep": 399, "size": 32, "iteration": steps}
    scheduler = read(run / "student" / "scheduler" / "scheduler_config.json")
    assert scheduler["_class_name"] == "LCMScheduler" and scheduler["beta_end"] == 0.012
    of_lcm = {name for name in scheduler if name[0] != "_"} - {"clip_sample"}
    assert of_lcm <= inspect.signature(LCMScheduler).parameters.keys()  # diffusers would warn
    theirs = DDPMScheduler.from_pretrained(base, subfolder="scheduler").config
    assert all(scheduler[name] == theirs[name] for name in of_lcm & theirs.keys())
    assert scheduler["clip_sample"] is False


def test_the_student_of_any_size_is_saved_as_one_file(run, base, tmp_path, monkeypatch):
    """Of 10.27 GB at full size, where diffusers would begin a second file at 10."""
    said, save = {}, UNet2DConditionModel.save_pretrained
    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", lambda net, folder, **keywords: (
        said.update(keywords), save(net, folder, **keywords)))
    (tmp_path / "student.safetensors").symlink_to(run / "student.safetensors")
    generate.export(tmp_path, base, 0, base="", timestep=399, size=32)
    assert float(said["max_shard_size"].removesuffix("GB")) > 4e-9 * 2_567_463_684


def test_a_student_of_a_local_model_keeps_every_path_to_its_run(mine, tmp_path, no_figures):
    """The folder that goes to the hub has none, nor a file of a name that is one."""
    edit(mine / "unet" / "config.json", _name_or_path=str(mine))
    made = make(problem, "tiny", model=str(mine))
    files.save_tensors(tmp_path / "run" / "student.safetensors", made.student.state_dict())
    made.draw(tmp_path / "run", None, None)
    for file in (tmp_path / "run" / "student").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    for elsewhere in (None, {"backtrack": {"model": ""}}, {"backtrack": {"model": "no/place"}}):
        if elsewhere:
            files.save_json(tmp_path / "run" / "config.json", elsewhere)
        line = refusal(generate.load, str(tmp_path / "run"))
        assert "a folder that is known to its run alone: name that by --base" in line
    files.save_json(tmp_path / "run" / "config.json", {"backtrack": {"model": str(mine)}})
    for student in ("run", "run/student", "run/student/unet/diffusion_pytorch_model.safetensors"):
        pipe, about = generate.load(str(tmp_path / student))
        assert about == {"base": None, "timestep": 399, "size": 32, "iteration": 20}
        assert torch.equal(pipe.unet.conv_in.weight, made.student.unet.conv_in.weight)


@pytest.mark.parametrize("base, named, licence", [
    (generate.BASE, generate.BASE, "openrail++"), ("some/model", "some/model", "other"),
    (None, "OWNER/BASE-MODEL", "other"), ("", "OWNER/BASE-MODEL", "other")])
def test_the_model_card_says_base_licence_timestep_and_size(base, named, licence):
    """As huggingface's own reader of cards finds them."""
    card = huggingface_hub.ModelCard(generate.card(base, 123, 456))
    assert card.data.base_model == (base or None) and card.data.license == licence
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert ('variant="fp16"' in card.text) == (base == generate.BASE)
    assert f'base = "{named}"' in card.text and "[123], height=456, width=456" in card.text


def test_the_readmes_table_is_what_a_dry_run_prints(dry_runs):
    """The README's sums for batch 1 and 4 of `full` and `lora`, to a tenth of a GB."""
    readme = (ROOT / "sdxl" / "README.md").read_text()
    for preset, row in (("full", r"\*\*in all"), ("lora", "`lora`, rank"),
                        ("no average", "the same without")):
        sums = re.findall(r"batch [14]: in all, about +([\d.]+) +([\d.]+)", dry_runs[preset])
        for stage, cell in enumerate(re.search(row + r".*?\|(.*)\|(.*)\|", readme).groups()):
            told = [float(number) for number in cell.split("/")]
            assert told == pytest.approx([float(batch[stage]) for batch in sums], abs=0.06)


def snippet(text):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def test_the_snippet_of_readme_and_card_makes_the_pictures_of_sdxl_generate_without_a_warning(
        run, base, tmp_path, monkeypatch, capfd):
    """The snippet as it is, but for names, and on a CPU in float32."""
    code = snippet((ROOT / "sdxl" / "README.md").read_text())
    assert code == snippet(generate.card(generate.BASE, 399, 1024))
    for there, here in (('"stabilityai/stable-diffusion-xl-base-1.0"', repr(str(base))),
                        ('"YOU/YOUR-STUDENT"', repr(str(run / "student"))),
                        (', variant="fp16"', ""), ("torch.float16", "torch.float32"),
                        ('"cuda"', '"cpu"'), ("1024", "32"),
                        ("width=32", "width=32, generator=torch.manual_seed(7)")):
        assert there in code
        code = code.replace(there, here)
    monkeypatch.chdir(tmp_path)
    diffusers.utils.logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings(action="error", category=FutureWarning):
            exec(code, {})
    finally:
        diffusers.utils.logging.set_verbosity_error()
    assert "deprecat" not in capfd.readouterr().err
    generate.main(["A photo of a dog.", "--student", str(run), "--seeds", "7"])
    assert [file.name for file in tmp_path.iterdir()] == ["output.png"]
    theirs, ours = (np.asarray(Image.open(file)).astype(int) for file in (
        "output.png", run / "images" / "00-7.png"))
    assert ours.shape == (32, 32, 3)
    assert np.abs(theirs - ours).max() <= 1  # a rounding may fall on either side


def test_pictures_of_a_runs_weights_go_to_the_run_and_of_others_not_beside_them(
        run, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(run, tmp_path / "student")  # such a name means nothing
    file = shutil.copy(copy / "student" / generate.WEIGHTS, tmp_path / "mine.bin")
    for student, out in ((copy / "student" / generate.WEIGHTS, copy / "images"),
                         (copy / "student", copy / "images"), (copy, copy / "images"),
                         (copy / "student.safetensors", copy / "images"),
                         (file, tmp_path / "runs" / "images")):
        generate.main(["a dog", "--base", str(base), "--student", str(student)])
        assert {made.parent for made in tmp_path.rglob("00-0.png")} == {out}
        shutil.rmtree(out)


def test_generate_makes_a_picture_of_each_prompt_and_seed_that_no_other_changes(
        run, tmp_path, capsys):
    """One of a seed that is given twice; of long prompts it tells."""
    def pictures(folder, *flags):
        generate.main(["a dog", "q " * 80, "--student", str(run / "student"), "--seeds", "1", "2",
                       "1", "--out", str(tmp_path / folder), *flags])
        assert "1 of 2 prompts have over 77 tokens" in capsys.readouterr().err
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == names
        return [np.asarray(Image.open(tmp_path / folder / name)).astype(int) for name in names]

    names = [f"0{prompt}-{seed}.png" for prompt in (0, 1) for seed in (1, 2)] + ["grid.png"]
    *many, grid = pictures("many")
    for one, other in zip(many, pictures("few", "--batch", "1")):
        assert np.abs(one - other).max() <= 1
    assert all((one != other).any() for i, one in enumerate(many) for other in many[:i])
    rows = [np.concatenate(many[i:i + 2], axis=1) for i in (0, 2)]
    assert np.array_equal(grid, np.concatenate(rows))


def test_a_student_that_is_the_teacher_generates_what_the_teacher_would(
        base, mine, tmp_path, capsys):
    """A file of plain weights serves as well, as the published ones are; at the base's size. The
    base needs no weights of a UNet."""
    file = tmp_path / "weights.bin"
    torch.save(UNet2DConditionModel.from_pretrained(base / "unet").half().state_dict(), file)
    (mine / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe, about = generate.load(str(file), str(mine))
    note = "does not say its student's timestep: it draws at 399"
    assert f"note: {file} {note}\n" in capsys.readouterr().err
    edit(mine / "unet" / "config.json", sample_size=[16, 16])  # serves who says his size
    assert "the UNet's sample_size is [16, 16]" in refusal(generate.load, str(file), str(mine))
    shutil.copy(file, tmp_path / generate.WEIGHTS)
    capsys.readouterr()
    assert generate.find(str(tmp_path / generate.WEIGHTS))[1]["timestep"] == 399
    assert note not in capsys.readouterr().err
    said = {"base": "", "timestep": 7, "size": 48}
    files.save_json(tmp_path / generate.ABOUT, said)
    assert generate.load(str(tmp_path), str(mine))[1] == said
    assert note not in capsys.readouterr().err
    assert about == {"base": generate.BASE, "timestep": 399, "size": 32}
    teacher = model.load(base)[0].half().float().state_dict()
    assert same(pipe.unet.state_dict(), teacher)


# ------------------------------------------------------------------------------------- figures


def test_the_snapshots_are_of_the_noise_and_the_prompts_that_the_figures_name(watched, tiny):
    z, cond = tiny.snapshot()
    first = load_file(watched.out / "snapshots" / "0000000.safetensors")["x0"]
    torch.testing.assert_close(tiny.generate(tiny.student, z, cond), first)
    expected = [text.read_prompts(text.SHIPPED)[i] for i in cond["prompt"]]
    sheets = watched.sheets
    for _, prompts in sheets.values():
        assert prompts == expected
    assert [label for label, _ in sheets["path.png"][0]] == ["teacher", "node 1", "node 2"]
    assert [label for label, _ in sheets["student.png"][0]] == [
        "0: to node 1", "2: to the teacher", "3: the end"]
    rows = [np.stack(pictures) for rows, _ in sheets.values() for _, pictures in rows]
    assert all((one != other).any() for i, one in enumerate(rows) for other in rows[:i])


def test_a_decoded_picture_is_the_pipelines(pipe):
    torch.manual_seed(0)
    options = dict(prompt="a dog", num_inference_steps=1)
    latents = torch.randn(1, 4, 16, 16)
    raw = pipe(**options, latents=latents, output_type="latent").images
    theirs = pipe(**options, latents=latents, output_type="np").images
    np.testing.assert_allclose(figures.decode(pipe.vae, raw)[0], theirs[0], atol=1e-6)


def test_the_sampler_draws_a_gaussian_from_its_exact_denoiser(gaussian):
    torch.manual_seed(0)
    net = gaussian(1.0, 0.5).float()
    x = assembly.sample(net, torch.randn(200, 4, 8, 8), None, sigma_table(), steps=200)
    assert x.mean().item() == pytest.approx(1.0, abs=0.05)
    assert x.std().item() == pytest.approx(0.5, abs=0.05)


def test_evaluating_changes_no_random_number_and_tells_the_students_spread(tiny):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    metrics = tiny.evaluate(tiny.student)
    assert torch.equal(torch.randn(3), expected) and metrics == tiny.evaluate(tiny.student)
    still = assembly.evaluate(None, lambda student, z, cond: 3 * z + 2, (
        torch.randn(100, 4, 16, 16), None))
    assert still["latent_std"] == pytest.approx(3, rel=0.02)
    assert still["latent_mean"] == pytest.approx(2, abs=0.05)


# -------------------------------------------------------------------------- size and precision


def test_the_full_unet_has_the_parameters_and_the_attention_of_sdxl(full_unet):
    attention = [name for name, _ in full_unet.named_modules() if name.endswith(model.ADAPTED)]
    assert len(attention) == 2 * 70 * 4  # self and cross attention of 70 blocks, four maps each
    assert sum(p.numel() for p in full_unet.parameters()) == 2_567_463_684


def test_the_table_of_the_full_size_adds_up_and_lora_fits_a_small_card(dry_runs):
    rows, lora = ({line[:46].strip(): line[46:].split() for line in dry_runs[name].splitlines()}
                  for name in ("full", "lora"))
    assert lora["frozen weights"] == ["5.13", "5.13"]
    assert float(lora["batch 1: in all, about"][1]) < 12
    assert rows["AdamW: two moments of what is trained"] == ["20.54", "41.08"]
    assert rows["the path"] == ["51.35", "92.43"]  # 8 or 16 nodes of 5.13; the teacher's 10.27
    assert rows["a checkpoint of stage 1"] == ["30.81", "61.62"]  # 1 network, 2 moments; and the
    assert rows["a checkpoint of stage 2"] == ["71.89", "143.78"]  # next; 3 networks, 4 moments
    parts = [name for name in rows if name.startswith(("weights", "moving", "Adam", "grad", "cop"))]
    for batch in (1, 4):
        about = float(rows[f"batch {batch}: activations, about"][1])
        total = sum(float(rows[name][1]) for name in parts) + about
        assert float(rows[f"batch {batch}: in all, about"][1]) == pytest.approx(total, abs=0.04)


@pytest.fixture(scope="module")
def checkpointing():
    return make(problem, "tiny", checkpointing="yes")


def test_the_estimate_of_activations_is_near_what_a_real_forward_keeps(tiny, checkpointing):
    unet = memory.on_meta(dict(tiny_pipeline.unet().config))
    stored, checkpointed = memory.activations(unet, 16, bf16=False)
    kept = kept_by_a_forward(tiny)
    assert stored == pytest.approx(kept, rel=0.2) and checkpointed < stored / 1.5
    assert kept_by_a_forward(checkpointing) < kept / 1.5


def kept_by_a_forward(made):
    """GB that autograd keeps of a sample's forward, weights left out."""
    z, cond = made.sample_inputs(1)
    own, kept = {p.data_ptr() for p in made.teacher.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made.teacher(z, made.sample_sigma(1), cond)
    return sum(size for size, _ in kept.values()) / 1e9


def test_checkpointing_changes_no_gradient_and_bf16_little(tiny, checkpointing):
    z, cond = tiny.sample_inputs(2)
    sigma, gradients = tiny.sample_sigma_vsd(2), []
    for made in (tiny, checkpointing, make(problem, "tiny", precision="bf16")):
        net = made.teacher
        x0 = net(z, sigma, cond)
        assert x0.dtype == torch.float32
        gradient = torch.autograd.grad(x0.square().mean(), [*net.parameters()])
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    assert relative(gradients[1], gradients[0]) <= 1e-6
    assert 1e-5 < relative(gradients[2], gradients[0]) < 0.05
