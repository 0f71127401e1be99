"""The settings of SDXL's runs. They stand apart from what reads them, as diffusers takes seconds to
load, which --help does without."""

from dataclasses import dataclass, replace
from typing import Literal

import disback
from runtime import interface
from runtime.interface import setting


@dataclass(frozen=True, kw_only=True)
class Config(interface.Config):
    """The settings that SDXL has beside those of every problem. DMD2 names the SDXL recipe whose
    values the official DisBack has too."""

    model: str = setting(
        "", "folder or hub's name of an SDXL base pipeline; empty: a tiny random one")
    prompts: str = setting(
        "", "text file, a prompt a line; empty: the 200 of sdxl/prompts.txt")
    size: int = setting(32, "width and height of the images, pixels")
    timestep: int = setting(
        399, "of the teacher, at which the student makes its one step, as DMD2")
    guidance: float = setting(8.0, "scale of the target's classifier-free guidance, as DMD2")
    t_min: int = setting(
        20, "least timestep of the student's update, as DMD2; the fake's are 0 to 999", zero=True)
    t_max: int = setting(980, "its largest timestep")
    clip: float = setting(10.0, "largest norm of a gradient, as DMD2")
    rank: int = setting(0, "of the LoRA adapters that are trained, through peft; 0: all weights "
                        "are trained", zero=True)
    checkpointing: Literal["no", "yes"] = setting(
        "no", "compute activations twice to store them less")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.switch == "adaptive":
            raise disback.Refusal("--switch must be interval: adaptive compares distances between "
                                  "networks that are not guided, and here the target is")
        if self.size % 8:
            raise disback.Refusal(f"--size must be divisible by 8, not {self.size}")
        if not self.t_min < self.t_max < 1000 or self.timestep >= 1000:
            raise disback.Refusal(f"--timestep {self.timestep}, --t-min {self.t_min} and --t-max "
                                  f"{self.t_max} must be below 1000, --t-min below --t-max")


# The rates mean nothing on a random network; updates, Adam and weighting are DMD2's.
TINY = Config(degrade_steps=40, backtrack_steps=20, batch=2, nodes=4, interval=4, weighting="dmd",
              lr_student=1e-3, lr_fake=1e-3, lr_degrade=1e-3, fake_updates=5, beta1=0.9,
              weight_decay=0.01, decay="constant", ema=0.9, save_every=10, log_every=2)
FULL = replace(
    TINY, model="stabilityai/stable-diffusion-xl-base-1.0", size=1024, batch=4,
    degrade_steps=1000, backtrack_steps=20_000, nodes=8, interval=1000, lr_student=5e-7,
    lr_fake=5e-7, lr_degrade=5e-7, ema=0.999, save_every=1000, log_every=50, precision="bf16",
    checkpointing="yes")
LORA = replace(FULL, rank=64, batch=1, lr_student=5e-5, lr_fake=5e-5, lr_degrade=5e-5)  # untried
PRESETS = {"tiny": TINY, "full": FULL, "lora": LORA}
