"""The problem out of a pipeline's parts: its denoiser, its prompts' embeddings, its figures."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import disback
from runtime import files, interface, ranks
from sdxl import figures, generate, layout, memory, model, text
from sdxl.settings import Config

OF_PATH = ("size", "timestep", "rank")
SHOWN = 6  # pictures that are kept at every checkpoint and switch


def make(config: Config, seed: int = 0,
         device: torch.device | str = "cpu") -> interface.Problem:
    """SDXL as the stages see it.

    The prompts' embeddings are cached on first use; the model is found by `sdxl.model.find`.
    """
    if config.rank:
        model.must_have_peft()
    prompts = text.read_prompts(config.prompts or text.SHIPPED)
    if config.prompts and ranks.rank() == 0:
        print(f"prompts: {len(prompts)} in {config.prompts}, the first: {prompts[0][:60]}")
    cache = files.cached("")
    folder = model.find(config.model, cache)
    bank = text.embed(folder, prompts, cache, device)
    teacher, sigmas = as_denoiser(*model.load(folder), config, device)
    vae = model.load_part(AutoencoderKL, folder, "vae")  # now: the figures come after days
    whole = 8 * sum(p.numel() for p in teacher.parameters())  # twice in float32
    made = assemble(config, seed, device, teacher, sigmas, bank,
                    config.size // layout.vae_scale(folder))
    shown = made.snapshot()

    def draw(out: Path, path: disback.DegradationPath | None, compare: Path | None) -> None:
        local = config.model and folder == Path(config.model).expanduser()
        if ranks.rank() == 0:
            generate.export(out, folder, config.rank, timestep=config.timestep, size=config.size,
                            iteration=config.backtrack_steps,
                            base=None if local else config.model)
        ranks.barrier()
        figures.draw(out, path, compare, vae, teacher,
                     lambda net: sample(partial(made.guide, net), *shown, sigmas),
                     [prompts[i] for i in shown[1]["prompt"]])

    hashes = [files.sha256(file) for file in layout.read(folder)]
    about = made.about | {
        "model_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}
    return replace(made, about=about, draw=draw, exported=whole)


def assemble(config: Config, seed: int, device: torch.device | str, teacher: model.Denoiser,
             sigmas: Tensor, bank: dict[str, Tensor], side: int) -> interface.Problem:
    """The problem of a teacher and the prompts' embeddings, but for its figures; latents have
    `side` x `side` pixels."""
    if not config.model:
        torch.set_num_threads(1)  # at this size threads cost more than they give
    step = partial(one_step, sigma=sigmas[config.timestep])
    sample_inputs = partial(draw_inputs, bank=bank, shape=(4, side, side))
    torch.manual_seed(seed)  # the snapshots' noise and prompts, which the figures use as well
    shown = sample_inputs(SHOWN)
    of_path = (*OF_PATH, "precision") if config.rank else OF_PATH  # adapters start in its numbers
    return interface.Problem(
        config=config, about={name: getattr(config, name) for name in of_path},
        teacher=teacher, student=copy.deepcopy(teacher), generate=step,
        sample_inputs=sample_inputs,
        sample_sigma=lambda n: sigmas[torch.randint(1000, (n, 1, 1, 1), device=device)],
        sample_sigma_vsd=lambda n: sigmas[
            torch.randint(config.t_min, config.t_max + 1, (n, 1, 1, 1), device=device)],
        score_weight=lambda sigma: sigma**-2,  # makes it the mean of |eps_hat - eps|^2
        evaluate=lambda student: evaluate(student, step, shown), snapshot=lambda: shown,
        draw=lambda *_: None, guide=partial(model.guide, scale=config.guidance), guide_evals=2,
        clip=config.clip, disk=memory.path_bytes(teacher, config),
        pack=lambda net: model.difference(net, teacher), load_node=model.add_difference,
        blocks=(BasicTransformerBlock, ResnetBlock2D))


def as_denoiser(unet: UNet2DConditionModel, sigmas: Tensor, config: Config,
                device: torch.device | str) -> tuple[model.Denoiser, Tensor]:
    """The denoiser, with LoRA's adapters where there is a rank, and the sigmas [1000], in place."""
    bf16 = config.precision == "bf16"
    if config.rank:  # what is frozen needs no more bits than it is computed with
        unet = model.adapt(unet.bfloat16() if bf16 else unet, config.rank)
    if config.checkpointing == "yes":
        unet.enable_gradient_checkpointing()
    return model.Denoiser(unet, sigmas, config.size, bf16).to(device), sigmas.to(device)


def one_step(student: nn.Module, z: Tensor, cond: dict[str, Tensor], sigma: Tensor) -> Tensor:
    """x0 of the student, from noise z [n, 4, h, w] of unit variance: z takes the place of the
    teacher's input at that timestep, which is x / sqrt(1 + sigma**2)."""
    sigma = sigma.view(1, 1, 1, 1)
    return student(z * (1 + sigma**2).sqrt(), sigma, cond)


def draw_inputs(n: int, bank: dict[str, Tensor], shape: tuple) -> tuple[Tensor, dict[str, Tensor]]:
    """z [n, *shape] and the embeddings of n random prompts; no wait for the device."""
    device = bank["text"].device
    z, prompt = torch.randn(n, *shape, device=device), torch.randint(
        len(bank["text"]), (n,), device=device)
    return z, {"prompt": prompt} | {name: bank[name][prompt] for name in ("text", "pooled")}


@torch.no_grad()
def evaluate(student: nn.Module, step: Callable, shown: tuple) -> dict[str, float]:
    """Mean and standard deviation of the student's latents, of the same noise and prompts at every
    call: an alarm, no measure of quality. The data's deviation is about 1."""
    x0 = step(student, *shown)
    mean, std = torch.stack([x0.mean(), x0.std()]).tolist()
    return {"latent_mean": mean, "latent_std": std}


@torch.no_grad()
def sample(net: Callable, z: Tensor, cond: dict[str, Tensor], sigmas: Tensor,
           steps: int = 20) -> Tensor:
    """Samples [n, 4, h, w] of a denoiser by Euler's method on the probability-flow ODE, through
    `steps` of the schedule's sigmas [1000] from the largest to 0."""
    levels = sigmas[torch.linspace(999, 0, steps, device=sigmas.device).long()]
    x, levels = z * levels[0], torch.cat([levels, levels.new_zeros(1)]).view(-1, 1, 1, 1, 1)
    for sigma, lower in zip(levels, levels[1:]):
        x = x + (lower - sigma) * (x - net(x, sigma, cond)) / sigma
    return x
