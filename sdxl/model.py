"""SDXL's UNet as a denoiser, and its files: a local folder of diffusers' layout, or the hub's."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import disback
from runtime import files, place
from sdxl import tiny

# What is read of a pipeline's folder; the rest of the hub's (fp16, ONNX, Flax) is left there.
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors", "text_encoder_2/model.safetensors")
FILES = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
         "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json", *WEIGHTS)

ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")  # the linear maps that LoRA adds to
MINUS_TEACHER = "minus_teacher."  # before a difference's names, lest it be taken for weights


class Denoiser(nn.Module):
    """D(x, sigma, cond) -> x0 of x [n, 4, h, w] = x0 + sigma * eps, for sigma [n or 1, 1, 1, 1].

    SDXL was trained on sqrt(abar) * x0 + sqrt(1 - abar) * eps at 1000 timesteps and predicts eps.
    With sigma**2 = (1 - abar) / abar its input is x / sqrt(1 + sigma**2) and D = x - sigma * eps.
    A sigma, from 0.029 to 14.6, takes the timestep whose own is nearest in its logarithm. cond has
    text [n, 77, c] and pooled [n, p]; `size` is the images' width and height in pixels.
    """

    def __init__(self, unet: UNet2DConditionModel, sigmas: Tensor, size: int, bf16: bool = False):
        super().__init__()
        self.unet, self.bf16 = unet, bf16
        self.register_buffer("edges", (sigmas[1:] * sigmas[:-1]).sqrt(), persistent=False)
        # Original size, offset of the crop, target size: diffusers' values where none is given.
        self.register_buffer("time_ids", torch.tensor([[size, size, 0, 0, size, size]],
                                                      dtype=sigmas.dtype), persistent=False)
        self.register_state_dict_post_hook(leave_out_frozen)
        self.register_load_state_dict_pre_hook(fill_in_frozen)

    def __deepcopy__(self, memo: dict) -> "Denoiser":
        """A copy that shares what is frozen: the base of LoRA's adapters is in memory once."""
        memo.update((id(p), p) for p in self.parameters() if not p.requires_grad)
        made = memo[id(self)] = Denoiser.__new__(Denoiser)
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))  # less what is compiled
        return made

    def forward(self, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        # A tensor, never an int: torch.compile would compile again for every timestep.
        t = torch.bucketize(sigma.flatten(), self.edges)
        added = {"text_embeds": cond["pooled"], "time_ids": self.time_ids.expand(len(x), -1)}
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            eps = self.unet(x / (1 + sigma**2).sqrt(), t, encoder_hidden_states=cond["text"],
                            added_cond_kwargs=added, return_dict=False)[0]
        return x - sigma * eps


def leave_out_frozen(net: Denoiser, state: dict, prefix: str, _: dict) -> None:
    """A node, a checkpoint and a student hold what is trained: all weights, or LoRA's adapters."""
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            del state[prefix + name]


def fill_in_frozen(net: Denoiser, state: dict, prefix: str, *rest) -> None:
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            state[prefix + name] = parameter.detach()


def guide(net: Callable, x: Tensor, sigma: Tensor, cond: dict[str, Tensor],
          scale: float) -> Tensor:
    """Classifier-free guidance D(uncond) + scale * (D(cond) - D(uncond)) in one call of 2n
    samples; SDXL's unconditional embeddings are zeros, not those of an empty prompt."""
    both = {name: torch.cat([torch.zeros_like(cond[name]), cond[name]])
            for name in ("text", "pooled")}
    sigma = sigma.expand(len(x), -1, -1, -1)
    without, given = net(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return without + scale * (given - without)


def find(model: str, cache: Path, flag: str = "--model") -> Path:
    """The folder of `model`: the tiny pipeline's where it is empty, itself where it is a folder,
    and what the hub has under that name, fetched on first use, where it is not. Refuses, naming the
    `flag` that takes another, what lacks a file or has a broken one."""
    folder = Path(model) if model else tiny.folder(cache)
    if model and not folder.is_dir():
        with files.blame(f"model {model} is no folder here and was not to be had from the hub: "
                           f"where there is a network, fetch {', '.join(FILES)}, tokenizer/* and "
                           f"tokenizer_2/*, and name their folder by {flag}"):
            folder = Path(snapshot_download(model, allow_patterns=[*FILES, "tokenizer*/*"]))
    missing = [name for name in FILES if not (folder / name).is_file()]
    for name in ("tokenizer", "tokenizer_2"):  # transformers 5 writes the one file, the hub has two
        words = (folder / name / file for file in ("vocab.json", "merges.txt"))
        if not (folder / name / "tokenizer.json").is_file():
            missing += [str(file.relative_to(folder)) for file in words if not file.is_file()]
    if missing:
        raise disback.Refusal(f"{folder} lacks {', '.join(missing)}: {flag} takes the folder of "
                              "an SDXL pipeline in diffusers' layout")
    for name in WEIGHTS:
        with files.blame(f"{folder / name} is broken: fetch it again"), safe_open(
                folder / name, "pt"):
            pass
    vae_scale(folder)
    return folder


def vae_scale(folder: Path) -> int:
    """Pixels, across, of an image for each of its latents."""
    file = folder / "vae" / "config.json"
    with files.blame(f"{file} is no VAE's: fetch it again"):
        return 2 ** (len(files.load_json(file, "fetch it again")["block_out_channels"]) - 1)


def load(folder: Path) -> tuple[UNet2DConditionModel, Tensor]:
    """The UNet in float32, and sigma [1000] of its timesteps, ascending. Refuses what is not SDXL,
    does not predict eps, or has another kind of noise schedule."""
    kind = files.load_json(folder / "model_index.json", "it is no pipeline").get("_class_name")
    config = files.load_json(folder / "unet" / "config.json", "it is no UNet's config")
    added = config.get("addition_embed_type")
    if kind != "StableDiffusionXLPipeline" or added != "text_time":
        raise disback.Refusal(f"{folder} is not SDXL but {kind} (addition_embed_type {added}): "
                              "name an SDXL base model by --model")
    sigmas = load_sigmas(folder)  # first, as it takes no time
    return load_unet(config, folder / WEIGHTS[0]), sigmas


def load_sigmas(folder: Path) -> Tensor:
    """Sigma [1000] of the timesteps, ascending, from the scheduler's config; Refusal where that
    leaves something to diffusers' defaults, or has other than 1000 finite ones."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = files.load_json(file, "it is no scheduler's config")
    other = f"{file} has another noise schedule than SDXL's kind: name an SDXL base by --model"
    lacking = {"beta_start", "beta_end", "beta_schedule"} - config.keys()
    if lacking or str(config.get("_class_name")).startswith("EDM"):
        raise disback.Refusal(f"{other} ({config.get('_class_name')}, without {sorted(lacking)})")
    with files.blame(other):
        scheduler = DDPMScheduler.from_config(config)
    if scheduler.config.prediction_type != "epsilon":
        raise disback.Refusal(f"{folder} predicts {scheduler.config.prediction_type}; only epsilon "
                              "is known here: take a model that predicts it")
    abar = scheduler.alphas_cumprod.double()
    sigmas = ((1 - abar) / abar).sqrt().float()
    if len(sigmas) != 1000 or not sigmas[0] > 0 or not sigmas.isfinite().all():
        raise disback.Refusal(f"{other} ({len(sigmas)} sigmas from {sigmas[0]} to {sigmas[-1]})")
    return sigmas


def load_unet(config: dict, file: Path) -> UNet2DConditionModel:
    """A UNet in float32 of exactly the weights in `file`, which may be Denoiser's; of a safetensors
    file no second copy is made. Nothing is unpickled but tensors."""
    with files.blame(f"{file} does not hold this UNet: fetch it again, or name its own base"):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        state = (load_file(file) if file.suffix == ".safetensors"
                 else torch.load(file, map_location="cpu", weights_only=True))
        state = {name.removeprefix("unet."): value.float() for name, value in state.items()}
        unet.load_state_dict(state, strict=True, assign=True)
    return unet.eval()


def adapt(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """Freeze the UNet and give its attention LoRA's adapters, which start as nothing added."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise disback.Refusal("rank needs peft: pip install peft, or --rank 0") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same start for the path and for whoever walks it
        unet.requires_grad_(False).add_adapter(LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(ADAPTED)))
    for parameter in unet.parameters():
        if parameter.requires_grad:  # steps of a small learning rate are lost in 16 bits
            parameter.data = parameter.data.float()
    return unet


def merged(config: dict, base: Path, adapters: Path, rank: int) -> UNet2DConditionModel:
    """A plain UNet of the weights in `base` with the adapters in `adapters` added."""
    unet = adapt(load_unet(config, base), rank)
    files.load_net(adapters, Denoiser(unet, torch.ones(1), 0))
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def difference(net: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """What is stored of a node: its weights less the teacher's, in bfloat16. They keep in 16 bits
    what the weights themselves, rounded to as many, would lose."""
    base = teacher.state_dict()
    return {MINUS_TEACHER + name: (weight - base[name]).bfloat16()
            for name, weight in net.state_dict().items()}


@torch.no_grad()
def add_difference(file: Path, net: nn.Module) -> None:
    """Copy the teacher, node 0, over the weights of `net`, and add the difference in `file` where
    that is a later node: in place, tensor by tensor as the mapped files are read. ValueError where
    it does not fit."""
    teacher = file.with_name("00.safetensors")
    files.load_net(teacher, net, "record the path again")
    if file == teacher:
        return
    added = load_file(file)
    if not all(name.startswith(MINUS_TEACHER) for name in added):
        raise ValueError("it holds no difference to the teacher")
    added = {name.removeprefix(MINUS_TEACHER): change for name, change in added.items()}
    disback.must_fit(net, added)
    for name, weight in net.state_dict().items():
        change = added.pop(name).to(weight.device, weight.dtype)
        weight += place.sharded_like(change, weight)
