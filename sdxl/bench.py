"""What an iteration of backtrack.py costs, and where its time goes: python -m sdxl.bench

Preset tiny is the tiny UNet, preset full SDXL's own at 1024 x 1024 pixels, both of random weights;
prompts are random embeddings. See runtime/bench.py.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import backtrack
from disback import Refusal
from runtime import bench, command
from runtime.interface import Problem
from sdxl import assembly, memory, tiny
from sdxl.settings import FULL, TINY, Config

PROMPTS = 200


def make(config: Config, seed: int, device: Any) -> Problem:
    """A random UNet, made where it is to be, of the tiny one's shape or of SDXL's."""
    if config.model not in (TINY.model, FULL.model):
        raise Refusal(f"--model {config.model} is of no use to a benchmark, whose weights are "
                      "random: --preset full has SDXL's shape")
    shape, scale = (memory.BASE, 8) if config.model else (dict(tiny.unet().config), 2)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(shape).eval()
    teacher, sigmas = assembly.as_denoiser(unet, noise_levels(), config, device)
    bank = embeddings(shape, device)
    return assembly.assemble(config, seed, device, teacher, sigmas, bank, config.size // scale)


def noise_levels() -> Tensor:
    """SDXL's sigmas [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = (1 - betas).cumprod(0)
    return ((1 - abar) / abar).sqrt()


def embeddings(shape: dict, device: Any) -> dict[str, Tensor]:
    """Numbers of the shapes of text.embed."""
    pooled = shape["projection_class_embeddings_input_dim"] - 6 * shape["addition_time_embed_dim"]
    return {"text": torch.randn(PROMPTS, 77, shape["cross_attention_dim"], device=device),
            "pooled": torch.randn(PROMPTS, pooled, device=device)}


BENCH = bench.Bench("sdxl", make, backtrack)

if __name__ == "__main__":
    command.run(lambda argv: bench.main(BENCH, 3, argv),
                "lower --batch or the network's size, or raise --accumulate")
