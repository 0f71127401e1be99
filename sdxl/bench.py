"""What an iteration of backtrack.py costs, and where its time goes: python -m sdxl.bench

Preset tiny is the tiny UNet, preset full SDXL's own at 1024 x 1024 pixels, both of random weights;
prompts are random embeddings. See toy2d/bench.py.
"""

import functools
from pathlib import Path
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import disback
from sdxl import memory, model, text, tiny
from toy2d import bench

TINY = Path("")  # as the preset's --model is empty; of any other the UNet is SDXL base's


def unet_config(folder: Path) -> dict:
    return dict(tiny.unet().config) if folder == TINY else memory.BASE


def load(folder: Path) -> tuple[UNet2DConditionModel, Tensor]:
    """A random UNet, made where it is to be, and SDXL's sigmas [1000]."""
    with disback.device():
        unet = UNet2DConditionModel.from_config(unet_config(folder))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = (1 - betas).cumprod(0)
    return unet.eval(), ((1 - abar) / abar).sqrt()


def embed(folder: Path, prompts: list[str], cache: Path,
          device: torch.device) -> dict[str, Tensor]:
    """Numbers of the shapes of text.embed."""
    c = unet_config(folder)
    pooled = c["projection_class_embeddings_input_dim"] - 6 * c["addition_time_embed_dim"]
    return {"text": torch.randn(len(prompts), 77, c["cross_attention_dim"], device=device),
            "pooled": torch.randn(len(prompts), pooled, device=device)}


RANDOM = [mock.patch.multiple(model, find=lambda name, cache: Path(name), FILES=(), load=load,
                              vae_scale=lambda folder: 2 if folder == TINY else 8),
          mock.patch.object(text, "embed", embed)]

if __name__ == "__main__":
    disback.run(functools.partial(bench.main, "sdxl", RANDOM, 3))
