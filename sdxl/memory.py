"""What a run would take of the GPU's memory and of the disk, before anything is allocated: the UNet
is built on the meta device, where tensors have shapes and no data."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from runtime import files
from sdxl import layout, tiny
from sdxl.model import ADAPTED, must_be_sdxl
from sdxl.settings import FULL, Config

# The config of stabilityai/stable-diffusion-xl-base-1.0's UNet: 2,567,463,684 parameters.
BASE = dict(
    sample_size=128, in_channels=4, out_channels=4, layers_per_block=2,
    block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)


def of_run(config: Config) -> str:
    """The table of a run, by the UNet that it would have; nothing is fetched or allocated."""
    file, note = Path(config.model, "unet", "config.json").expanduser(), ""
    if not config.model:
        unet, scale = dict(tiny.unet().config), 2
    elif file.is_file():
        must_be_sdxl(file.parents[1])
        unet, scale = files.load_json(file, "no UNet"), layout.vae_scale(file.parents[1])
    else:
        if not layout.on_hub(config.model):
            layout.find(config.model, Path())  # refuses it
        unet, scale = BASE, 8
        if config.model != FULL.model:
            note = f"note: {config.model} is no folder here; these are SDXL base's numbers\n"
    with files.blame(f"{file} is no UNet's config: {layout.again(file)}"):
        return note + table(unet, config, config.size // scale)


def on_meta(unet_config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(unet_config)


def table(unet_config: dict, config: Any, side: int) -> str:
    """Gigabytes (1e9 bytes) of either stage at batch 1, 4 and the config's own, for latents of
    `side` squared. Weights, gradients and optimizer are exact; activations are estimated."""
    unet = on_meta(unet_config)
    count = sum(p.numel() for p in unet.parameters())
    whole, trained = 4e-9 * count, 4e-9 * (adapter_parameters(unet, config.rank) or count)
    average = trained * (config.ema > 0)
    bf16 = whole / 2 if config.precision == "bf16" else 0.0
    rows = [("weights that are trained: teacher, student, ...", 3 * trained, 3 * trained),
            ("moving average of the student", 0.0, average),
            ("AdamW: two moments of what is trained", 2 * trained, 4 * trained),
            ("gradients, of one network at a time", trained, trained),
            ("frozen weights" if config.rank else "copies in bf16 that autocast makes",
             *(2 * [bf16 or whole] if config.rank else 2 * [bf16]))]
    static = [sum(row[stage] for row in rows) for stage in (1, 2)]
    stored, checkpointed = activations(unet, side, config.precision == "bf16")
    for batch in sorted({1, 4, config.batch}):
        taken = batch * (checkpointed if config.checkpointing == "yes" else stored)
        rows += [(f"batch {batch}: activations, about", taken, taken),
                 (f"batch {batch}: in all, about", static[0] + taken, static[1] + taken)]
    node = trained / 2  # in bf16
    disk = [("the path", trained + config.nodes * node, trained + 2 * config.nodes * node),
            ("a checkpoint of stage 1", 3 * trained, 6 * trained),
            ("a checkpoint of stage 2", *(n * (6 * trained + average) for n in (1, 2))),
            ("the student", trained + 2 * whole, trained + 2 * whole)]
    return "\n".join([
        f"{f'{count:,} parameters; GB in':46}{'degrade.py':>10}{'backtrack.py':>13}",
        *(f"{name:46}{one:10.2f}{two:13.2f}" for name, one, two in rows),
        f"{'GB on disk':46}{'kept':>10}{'at most':>13}",
        *(f"{name:46}{kept:10.2f}{peak:13.2f}" for name, kept, peak in disk)])


def path_bytes(teacher: nn.Module, config: Any) -> int:
    """What stage 1 takes on disk at most: node 0, 2N candidates, a checkpoint and the next one."""
    weights = teacher.state_dict().values()
    return sum(7 * w.nbytes + 2 * config.nodes * 2 * w.numel() for w in weights)


def adapter_parameters(unet: nn.Module, rank: int) -> int:
    """Parameters of LoRA's adapters of that rank, 0 for rank 0."""
    return sum(rank * (linear.in_features + linear.out_features)
               for name, linear in unet.named_modules() if name.endswith(ADAPTED))


def activations(unet: nn.Module, side: int, bf16: bool) -> tuple[float, float]:
    """GB that a forward of one sample keeps for its backward: all of it, and with checkpointing,
    where only the blocks' inputs stay and one block at a time, here the largest, is done again."""
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, lest another takes a freed one's address
    inside: dict[Any, float] = {None: 0.0}
    sides = [side >> level for level in range(len(unet.config.block_out_channels))]
    current, entered = [None], [0.0]

    def pack(x: Tensor) -> Tensor:
        address = x.untyped_storage()._cdata
        if address not in own and address not in kept and not is_attention(x, sides):
            kept[address] = x
            inside[current[-1]] += x.untyped_storage().nbytes()
        return x

    def enter(block: nn.Module, args: tuple) -> None:
        current.append(block)
        inside[block] = 0.0
        entered[0] += args[0].nbytes

    def leave(*args: Any) -> None:  # a hook that returned something would replace the output
        current.pop()

    with contextlib.ExitStack() as hooks:
        for block in unet.modules():
            if isinstance(block, (ResnetBlock2D, BasicTransformerBlock)):
                hooks.callback(block.register_forward_pre_hook(enter).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call(unet, side)
    scale = 1e-9 / (2 if bf16 else 1)
    outside = inside.pop(None)
    return (outside + sum(inside.values())) * scale, (
        outside + entered[0] + max(inside.values())) * scale


def is_attention(x: Tensor, sides: list[int]) -> bool:
    """Whether x is a matrix of tokens by tokens, which the meta device's attention keeps and the
    fused attention of a GPU does not."""
    tokens = {side**2 for side in sides}
    return x.dim() >= 3 and x.shape[-2] in tokens and x.shape[-1] in tokens | {77}


def call(unet: nn.Module, side: int) -> Tensor:
    """A forward of one sample, empty, of the right shapes."""
    c = unet.config
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    with torch.device("meta"):
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        return unet(torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long),
                    torch.empty(1, 77, c.cross_attention_dim), added_cond_kwargs=added).sample
