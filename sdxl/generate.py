"""Images in one step, of a student or of the weights that the authors of DisBack published."""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from huggingface_hub import hf_hub_download
from PIL import Image

import disback
from runtime import command, files, ranks, results
from sdxl import model, text

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
WEIGHTS = "SDXL_DisBack.bin"  # the name of the published weights, and of the student's
ABOUT = "disback.json"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m sdxl.generate", description=__doc__,
                                     allow_abbrev=False)
    parser.error = command.refuse
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a picture for each and seed")
    parser.add_argument("--student", default="runs/sdxl", help="a run's folder, a file of a UNet's "
                        "weights, or a name on the hub: SYZhang0805/DisBack (default: runs/sdxl)")
    parser.add_argument("--base", help="folder or hub's name of the pipeline around the UNet "
                        f"(default: the student's own, or {BASE})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the noise (0)")
    parser.add_argument("--out", type=command.path, default="images",
                        help="folder of the PNGs (images)")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time (4)")
    parser.add_argument("--steps", type=int, choices=[1], default=1, help="the student makes 1")
    args = parser.parse_args(argv)
    if args.batch < 1 or any(not 0 <= seed < 2**63 for seed in args.seeds):
        command.refuse("--batch must be 1 or more, and --seeds from 0 to 2**63 - 1")
    with files.blame(f"--out takes a folder, which {args.out} is not"):
        args.out.mkdir(parents=True, exist_ok=True)
    ranks.join_ranks()
    with ranks.first_rank_first():
        pipe, about = load(args.student, args.base)
    if ranks.rank() == 0:
        text.note_long(args.prompts, pipe.tokenizer)
    seeds = list(dict.fromkeys(args.seeds))  # a seed that is given twice makes one picture
    jobs = [(prompt, seed) for prompt in args.prompts for seed in seeds]
    numbered = results.SplitOverRanks(
        lambda numbers: pixels(pictures(pipe, about, [jobs[i] for i in numbers])))
    size = ranks.world_size()  # the ranks share batches; the last picture fills up the last one
    batch, count = (-(-n // size) * size for n in (args.batch, len(jobs)))
    parts = torch.arange(count).clamp(max=len(jobs) - 1).split(batch)
    images = [Image.fromarray(image.numpy()) for part in parts for image in numbered(part)]
    del images[len(jobs):]
    for i, (image, (_, seed)) in enumerate(zip(images, jobs)):
        save_png(args.out / f"{i // len(seeds):02d}-{seed}.png", image)
    save_png(args.out / "grid.png", grid(images, len(seeds)))
    if ranks.rank() == 0:
        print(f"{len(images)} pictures and grid.png are in {args.out}")


def load(student: str, base: str | None = None) -> tuple[StableDiffusionXLPipeline, dict]:
    """A pipeline around the student's UNet, in fp16 on a GPU, and what the student says of itself:
    its base, timestep and size in pixels."""
    file, about = find(student)
    folder = model.find(about["base"] if base is None else base, files.cached(""),
                        "--base")
    unet = model.load_unet(files.load_json(folder / "unet/config.json", "fetch it again"), file)
    with files.blame(f"{folder} is no SDXL pipeline: fetch it again, or name another by --base"):
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, unet=unet)
    about.setdefault("size", unet.config.sample_size * model.vae_scale(folder))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return (pipe.to(ranks.device(), torch.float16) if torch.cuda.is_available() else pipe), about


def find(student: str) -> tuple[Path, dict]:
    """The file of a student's weights, and about it; Refusal where there is none."""
    place, about = Path(student), {"base": BASE, "timestep": 399}
    for folder in (place / "student", place):
        if (folder / ABOUT).is_file():
            return folder / WEIGHTS, about | files.load_json(folder / ABOUT, "export it again")
    if place.is_dir():
        raise disback.Refusal(f"{place} holds no student: let backtrack.py sdxl end first")
    with files.blame(f"{student} is no folder or file here and the hub gave no {WEIGHTS}: where "
                       "there is a network, fetch that file and name it by --student"):
        return place if place.is_file() else Path(hf_hub_download(student, WEIGHTS)), about


def pictures(pipe: StableDiffusionXLPipeline, about: dict, jobs: list[tuple[str, int]]) -> list:
    """An image for each (prompt, seed): one step at the student's timestep, without guidance. An
    image depends on its own seed alone, whatever else is in the batch."""
    noise = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
    return pipe([prompt for prompt, _ in jobs], num_inference_steps=1, guidance_scale=0,
                timesteps=[about["timestep"]], generator=noise, height=about["size"],
                width=about["size"]).images


def pixels(images: list) -> torch.Tensor:
    """uint8 [n, h, w, 3] of n images."""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def grid(images: list, columns: int) -> Image.Image:
    """All images on one sheet, row by row."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_png(file: Path, image: Image.Image) -> None:
    files.atomically(file, lambda beside: image.save(beside, format="PNG"))


def export(out: Path, folder: Path, rank: int, **about) -> None:
    """Write OUT/student from OUT/student.safetensors, for diffusers: the UNet as save_pretrained
    has it and as a plain state dict, the scheduler, and `about`, with the timestep. Adapters of
    a `rank` above 0 are added to the weights of the base in `folder`."""
    config = files.load_json(folder / "unet" / "config.json", "fetch it again")
    file = out / "student.safetensors"
    unet = (model.merged(config, folder / model.WEIGHTS[0], file, rank) if rank
            else model.load_unet(config, file))
    beside = out / ".student"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with files.blame(f"cannot write {out}/student: make room, then backtrack.py --resume"):
            unet.save_pretrained(beside / "unet", max_shard_size="12GB")
            LCMScheduler.from_pretrained(folder, subfolder="scheduler").save_pretrained(
                beside / "scheduler")
            torch.save(unet.state_dict(), beside / WEIGHTS)
            files.save_json(beside / ABOUT, about)
            shutil.rmtree(out / "student", ignore_errors=True)
            os.replace(beside, out / "student")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


if __name__ == "__main__":
    command.run(main, "lower --batch")
