"""SDXL as the stages see it: text to image in one step, in the latent space of its autoencoder."""

import torch

from runtime.interface import Problem
from sdxl.settings import PRESETS, Config

__all__ = ["PRESETS", "WRITES", "dry_run", "make"]

WRITES = ("figures/path.png", "figures/student.png", "figures/mismatch.png",
          "student/unet/config.json", "student/unet/diffusion_pytorch_model.safetensors",
          "student/scheduler/scheduler_config.json", "student/SDXL_DisBack.bin",
          "student/disback.json")


def make(config: Config, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    """See assembly.make."""
    from sdxl import assembly  # loads diffusers and matplotlib, which --help does without

    return assembly.make(config, seed, device)


def dry_run(config: Config) -> str:
    """The table of memory and disk that a run would take; nothing is fetched or allocated."""
    from sdxl import memory

    return memory.of_run(config)
