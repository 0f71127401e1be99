"""SDXL's UNet as a denoiser, its noise levels, and the weights of a pipeline's parts."""

import copy
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import disback
from runtime import files, place
from runtime.errors import must
from sdxl import OLDEST_PEFT, layout

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


def load(folder: Path) -> tuple[UNet2DConditionModel, Tensor]:
    """The UNet in float32, and sigma [1000] of its timesteps, ascending. Refuses what is not SDXL,
    does not predict eps, or has another kind of noise schedule."""
    must_be_sdxl(folder)
    return load_part(UNet2DConditionModel, folder, "unet"), load_sigmas(folder)


def find(name: str, cache: Path, flag: str = "--model",
         parts: Collection[str] = layout.PARTS) -> Path:
    """The folder of an SDXL pipeline, as `layout.find` has it."""
    return layout.find(name, cache, flag, parts, must_be_sdxl)


def must_be_sdxl(folder: Path, flag: str = "--model") -> None:
    """Refuse the pipeline of another model, of inpainting or distilled for guidance, or of another
    noise schedule."""
    layout.must_be_pipeline(folder, flag)
    config = files.load_json(folder / "unet" / "config.json", layout.again(folder))
    for name, of_sdxl, default in (
            ("addition_embed_type", "text_time", None), ("in_channels", 4, 4),
            ("out_channels", 4, 4), ("time_cond_proj_dim", None, None),
            ("class_embed_type", None, None), ("encoder_hid_dim_type", None, None)):
        if (found := config.get(name, default)) != of_sdxl:
            raise disback.Refusal(f"{folder} has a UNet with {name} {found}, not {of_sdxl}: name "
                                  f"an SDXL base model by {flag}")
    first, second = (files.load_json(folder / part / "config.json", layout.again(folder))
                     for part in ("text_encoder", "text_encoder_2"))
    with files.blame(f"the config.json of unet, text_encoder and text_encoder_2 in {folder} do not "
                     f"fit together: {layout.again(folder)}"):
        must(config["projection_class_embeddings_input_dim"] ==
             6 * config["addition_time_embed_dim"] + second["projection_dim"],
             "projection_class_embeddings_input_dim must be 6 * addition_time_embed_dim + "
             "projection_dim")
        must(config["cross_attention_dim"] == first["hidden_size"] + second["hidden_size"],
             "cross_attention_dim must be the sum of their hidden_size")
    load_sigmas(folder, flag)
    layout.vae_scale(folder)


def load_part(kind: type, folder: Path, part: str) -> nn.Module:
    """A part of the pipeline in float32, of exactly the weights in its files; Refusal where one is
    missing, unknown, of another shape, no float or not finite."""
    found, variant = layout.weights(folder, part)
    with files.blame(f"{found[0] if len(found) == 1 else folder / part} does not hold this "
                     f"{kind.__name__}: {layout.again(folder)}"):
        for file in found:
            held = safe_open(file, "pt")
            types = {name: held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118
            for name, dtype in types.items():
                if not dtype.startswith(("F", "BF")) and not name.endswith("position_ids"):
                    raise ValueError(f"{name} is of type {dtype}")
        net, report = kind.from_pretrained(folder / part, variant=variant, dtype=torch.float32,
                                           use_safetensors=True, output_loading_info=True,
                                           ignore_mismatched_sizes=True)  # the report names them
        if any(report.values()):
            raise ValueError(", ".join(f"{what}: {sorted(names)[:2]}"
                                       for what, names in report.items() if names))
        net.float()  # in a file of several types some weights keep theirs
        if broken := [name for name, w in net.state_dict().items() if not w.isfinite().all()]:
            raise ValueError(f"not finite: {', '.join(broken)}")
    return net.eval()


def load_sigmas(folder: Path, flag: str = "--model") -> Tensor:
    """Sigma [1000] of the timesteps, ascending, from the scheduler's config; Refusal where that
    leaves something to diffusers' defaults, or has other than 1000 finite ones."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = files.load_json(file, layout.again(file), float)  # DPM++ has an infinity
    other = f"{file} has another noise schedule than SDXL's kind: name an SDXL base by {flag}"
    lacking = {"beta_start", "beta_end", "beta_schedule"} - config.keys()
    if (count := config.get("num_train_timesteps", 1000)) != 1000:
        raise disback.Refusal(f"{other} (num_train_timesteps is {count!r})")
    if lacking or str(config.get("_class_name")).startswith(("EDM", "FlowMatch")):
        raise disback.Refusal(f"{other} ({config.get('_class_name')}, without {sorted(lacking)})")
    with files.blame(other):
        scheduler = DDPMScheduler.from_config(config)
    if scheduler.config.prediction_type != "epsilon":
        raise disback.Refusal(f"{folder} predicts {scheduler.config.prediction_type}; only epsilon "
                              "is known here: take a model that predicts it")
    abar = scheduler.alphas_cumprod.double()
    sigmas = ((1 - abar) / abar).sqrt().float()
    if len(sigmas) != 1000 or not sigmas[0] > 0 or not sigmas.isfinite().all() or not (
            sigmas.diff() > 0).all():
        raise disback.Refusal(f"{other} ({len(sigmas)} sigmas from {sigmas[0]} to {sigmas[-1]})")
    return sigmas


def read_unet(file: Path) -> dict[str, Tensor]:
    """The weights of a UNet in one `file`, which may be Denoiser's, under the UNet's own names.
    Nothing is unpickled but tensors."""
    with files.blame(f"{file} holds no weights of a UNet: "
                     + layout.again(file, "name another file, .safetensors or .bin")):
        state = (load_file(file) if file.suffix == ".safetensors"
                 else torch.load(file, map_location="cpu", weights_only=True))
        if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
            raise ValueError("it holds no plain state_dict of tensors by their names")
        if all(name.startswith("unet.") for name in state):
            state = {name.removeprefix("unet."): value for name, value in state.items()}
        must("conv_in.weight" in state, f"no conv_in.weight, but {sorted(state)[:2]}")
        return state


def load_unet(config: dict, state: dict[str, Tensor], file: Path) -> UNet2DConditionModel:
    """A UNet in float32 of exactly the weights that were read from `file`; of those in float32 no
    second copy is made."""
    with files.blame(f"{file} does not hold this UNet: name another file, or its own base"):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        disback.must_fit(unet, state)
        unet.load_state_dict({name: w.float() for name, w in state.items()}, assign=True)
    return unet.eval()


def must_have_peft() -> None:
    """Refuse --rank where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise disback.Refusal(f"--rank needs peft: pip install 'peft>={OLDEST_PEFT}', or name "
                              "--rank 0") from error


def adapt(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """Freeze the UNet and give its attention LoRA's adapters, which start as nothing added."""
    must_have_peft()
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same start for the path and for whoever walks it
        unet.requires_grad_(False).add_adapter(LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(ADAPTED)))
    for parameter in unet.parameters():
        if parameter.requires_grad:  # steps of a small learning rate are lost in 16 bits
            parameter.data = parameter.data.float()
    return unet


def merged(folder: Path, adapters: Path, rank: int) -> UNet2DConditionModel:
    """The plain UNet of a pipeline's folder with the adapters in the file `adapters` added."""
    unet = adapt(load_part(UNet2DConditionModel, folder, "unet"), rank)
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
