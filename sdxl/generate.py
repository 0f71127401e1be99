"""Images in one step, of a student or of the weights that the authors of DisBack published; and
the student's folder for diffusers and the hub."""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCardData, snapshot_download
from PIL import Image
from tqdm import tqdm

import disback
from runtime import command, files, pictures, ranks, records, results
from runtime.errors import must
from sdxl import layout, model, text

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
WEIGHTS = "SDXL_DisBack.bin"  # the name of the published weights, and of the student's
ABOUT = "disback.json"
PARTS = (WEIGHTS, "student.safetensors", "student", "unet", "diffusion_pytorch_model.safetensors")
CARD = Path(__file__).with_name("card.md")


def main(argv: list[str]) -> None:
    parser = command.parser("python -m sdxl.generate", __doc__)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a picture for each and seed")
    parser.add_argument("--student", type=command.home, default="runs/sdxl", help="a run's "
                        "folder, a file of a UNet's weights, or a name on the hub: "
                        "SYZhang0805/DisBack (default: runs/sdxl)")
    parser.add_argument("--base", type=command.home, help="folder or hub's name of the pipeline "
                        f"around the UNet (default: the student's own, or {BASE})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0],
                        help="of the noise, after PROMPT (0)")
    parser.add_argument("--out", type=command.path, help="folder of the PNGs (default: "
                        "images in the run's folder, or runs/images); those of the same names "
                        "are replaced")
    parser.add_argument("--batch", type=command.count, default=4, help="pictures at a time (4)")
    args = parser.parse_args(argv)
    if any(not 0 <= seed < 2**63 for seed in args.seeds):
        command.refuse("--seeds must be from 0 to 2**63 - 1")
    for prompt in args.prompts:
        if os.path.isfile(os.path.join(prompt or "-", "config.json")):
            command.refuse(f"{prompt} is a folder here, no prompt: name a run by --student")
        if os.path.isfile(prompt) and os.path.splitext(prompt)[1]:
            command.refuse(f"{prompt} is a file here, no prompt: write the words themselves")
    run = whole(args.student)
    of_run = (run / "student").is_dir()
    out = args.out or (run if of_run else Path("runs")) / "images"
    if args.out or of_run:  # else there may be no student
        files.must_take_files(out, "--out")
    seeds = list(dict.fromkeys(args.seeds))  # a seed that is given twice makes one picture
    jobs = [(prompt, seed) for prompt in args.prompts for seed in seeds]
    names = [out / f"{i // len(seeds):02d}-{seed}.png" for i, (_, seed) in enumerate(jobs)]
    for file in (*names, out / "grid.png"):
        pictures.must_be_ours(file, "--out")
    ranks.join_ranks()
    with ranks.first_rank_first():
        pipe, about = load(args.student, args.base)
    if ranks.rank() == 0:
        text.note_long(args.prompts, pipe.tokenizer)
    files.must_take_files(out, "--out", 2 * 3 * len(jobs) * about["size"] ** 2)  # with the grid
    numbered = results.SplitOverRanks(
        lambda numbers: generate(pipe, about, [jobs[i] for i in numbers]))
    size = ranks.world_size()  # the ranks share batches; the last picture fills up the last one
    batch, count = (-(-n // size) * size for n in (args.batch, len(jobs)))
    parts = torch.arange(count).clamp(max=len(jobs) - 1).split(batch)
    with tqdm(parts, unit="batch", disable=ranks.rank() > 0) as bar:
        images = [Image.fromarray(image.numpy()) for part in bar for image in numbered(part)]
    del images[len(jobs):]
    for file, image in zip(names, images):
        pictures.save(file, image)
    pictures.save(out / "grid.png", make_image_grid(images, len(args.prompts), len(seeds)))
    if ranks.rank() == 0:
        print(f"{len(images)} picture{'s' * (len(images) > 1)} and grid.png are in {out}")


def load(student: str, base: str | None = None) -> tuple[StableDiffusionXLPipeline, dict]:
    """A pipeline around the student's UNet, in fp16 on a GPU, and what the student says of itself:
    its base, timestep and size in pixels."""
    file, about = find(student)
    weights = model.read_unet(file)  # first: the base may be a download of gigabytes
    base = about["base"] if base is None else base
    base = local_base(whole(student)) if base is None else base
    folder = model.find(base, files.cached(""), "--base", layout.AROUND_UNET)
    config = files.load_json(folder / "unet/config.json", layout.again(folder))
    unet = model.load_unet(config, weights, file)
    with files.blame(f"{folder} is no SDXL pipeline: {layout.again(folder)}, or name "
                     "another by --base"):
        pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, unet=unet, vae=model.load_part(AutoencoderKL, folder, "vae"),
            **text.encoders(folder))
        text.must_fit_together(pipe)
        if "size" not in about:
            side = unet.config.sample_size
            must(type(side) is int and 0 < side < 2**13, f"the UNet's sample_size is {side!r}")
            about["size"] = side * layout.vae_scale(folder)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return (pipe.to(ranks.device(), torch.float16) if torch.cuda.is_available() else pipe), about


def find(student: str) -> tuple[Path, dict]:
    """The file of a student's weights, and about it; Refusal where there is none."""
    place, about = Path(student).expanduser(), {"base": BASE, "timestep": 399}
    if not place.exists() and layout.on_hub(student):
        with files.blame(f"{student} is no folder or file here and {layout.HUB} gave no {WEIGHTS}: "
                         "where there is a network, fetch that file and name it by --student"):
            place = Path(snapshot_download(student, allow_patterns=[WEIGHTS, ABOUT])) / WEIGHTS
            must(place.is_file(), "it has no such file")
    for folder in (whole(place) / "student", whole(place)):
        if (folder / ABOUT).is_file() and place.exists():
            about |= read_about(folder / ABOUT)
            records.note_older(folder.parent, about.get("iteration"))
            file = folder / WEIGHTS  # student.safetensors may hold adapters alone
            named = place.is_file() and (place.name != "student.safetensors" or not file.exists())
            return place if named else file, about
    if place.is_file():
        if place.name != WEIGHTS and ranks.rank() == 0:  # the published weights' is that
            print(f"note: {place} does not say its student's timestep: it draws at "
                  f"{about['timestep']}", file=sys.stderr)
        return place, about
    if place.is_dir():
        raise disback.Refusal(f"{place} holds no student: name the folder of a run of sdxl whose "
                              "backtrack.py has ended (--resume ends it), or a file of a UNet's "
                              "weights")
    raise disback.Refusal(f"{student} is not here: run degrade.py sdxl and backtrack.py sdxl, or "
                          "name another run or file by --student")


def whole(student: str | Path) -> Path:
    """The run's folder, or the one from the hub, of which `student` may be a part."""
    folder = Path(student).expanduser()
    while folder.name in PARTS and not (folder / "student").is_dir():
        folder = folder.parent
    return folder


def read_about(file: Path) -> dict:
    """What a student says of itself; Refusal where a value cannot be."""
    remedy = layout.again(file, "backtrack.py sdxl --resume writes it again")
    about = files.load_json(file, remedy)
    good = {"base": lambda base: base is None or isinstance(base, str),
            "timestep": lambda t: type(t) is int and 0 <= t < 1000,
            "size": lambda size: type(size) is int and size in range(8, 2**16, 8)}
    for name, fits in good.items():
        if name not in about or not fits(about[name]):
            raise disback.Refusal(f"{file} has {name} {about.get(name)!r}, which cannot be: "
                                  f"{remedy}")
    return about


def local_base(run: Path) -> str:
    """The folder of the base that a run's student is of, which it keeps to itself on the hub."""
    with files.blame("the student's base is no model of the hub, but a folder that is known to its "
                     "run alone: name that by --base"):
        base = json.loads((run / "config.json").read_text())["backtrack"]["model"]
        must(base and Path(base).expanduser().is_dir(), f"{base!r} is not here")
        return base


def generate(pipe: StableDiffusionXLPipeline, about: dict,
             jobs: list[tuple[str, int]]) -> torch.Tensor:
    """An image, uint8 [h, w, 3], for each (prompt, seed): one step at the student's timestep,
    without guidance. It depends on its own seed alone, whatever else is in the batch."""
    noise = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
    images = pipe([prompt for prompt, _ in jobs], num_inference_steps=1, guidance_scale=0,
                  timesteps=[about["timestep"]], generator=noise, height=about["size"],
                  width=about["size"], output_type="np").images
    if not np.isfinite(images).all():
        raise disback.Refusal("a picture is not finite: the student, or the VAE of its base, has "
                              "weights too large; name another by --student or --base")
    return torch.from_numpy((images * 255).round().astype("uint8"))


def export(out: Path, folder: Path, rank: int, **about) -> None:
    """Write OUT/student from OUT/student.safetensors, for diffusers: the UNet as save_pretrained
    has it and as a plain state dict, the scheduler, a model card, and `about`: the timestep, the
    size, the iteration, and the base's name on the hub, None where it has none. Adapters of a
    `rank` above 0 are added to the weights of the base in `folder`."""
    config = files.load_json(folder / "unet" / "config.json", layout.again(folder))
    file = out / "student.safetensors"
    unet = (model.merged(folder, file, rank) if rank
            else model.load_unet(config, model.read_unet(file), file))
    unet.register_to_config(_name_or_path="")  # no path of this machine goes to the hub
    with files.blame(f"cannot write {out}/student: backtrack.py --resume writes it again"), \
            tempfile.TemporaryDirectory(files.UNFINISHED, ".student.", out) as folder_beside, \
            files.asking_for_room(folder_beside):
        beside = Path(folder_beside)
        unet.save_pretrained(beside / "unet", max_shard_size="12GB")
        noise = {**LCMScheduler.load_config(folder, subfolder="scheduler"), "clip_sample": False}
        LCMScheduler(**LCMScheduler.extract_init_dict(noise)[0]).save_pretrained(  # DDIM's clips
            beside / "scheduler")
        torch.save(unet.state_dict(), beside / WEIGHTS)
        files.save_json(beside / ABOUT, about)
        (beside / "README.md").write_text(card(about["base"], about["timestep"], about["size"]))
        for made in sorted((made for made in beside.rglob("*") if made.is_file()),
                           key=lambda made: made.name == ABOUT):  # which says that all is there
            target = out / "student" / made.relative_to(beside)
            if target.name == "README.md" and os.path.lexists(target) and not is_card(target):
                print(f"note: {target} was edited, or is an earlier version's, and is kept: "
                      "remove it, and backtrack.py --resume writes one for this student")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            os.chmod(made, 0o666 & ~files.UMASK)  # safetensors leaves 0600
            os.replace(made, target)  # one by one: what a user keeps there stays


def card(base: str | None, timestep: int, size: int) -> str:
    """The model card for the hub, whose metadata name the base and its licence."""
    licence = dict(license="openrail++") if base == BASE else dict(
        license="other", license_name="as-the-base-model")
    metadata = ModelCardData(base_model=base or None, library_name="diffusers", tags=["disback"],
                             pipeline_tag="text-to-image", **licence)
    text = CARD.read_text().format(metadata=metadata.to_yaml().strip(), timestep=timestep,
                                   size=size, base=base or "OWNER/BASE-MODEL",
                                   variant=', variant="fp16"' if base == BASE else "")
    return f"{text}\n<!-- {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_card(file: Path) -> bool:
    """Whether a model card is as it was written here: it ends with the hash of what is before."""
    if not file.is_file() or file.is_symlink():
        return False
    text, _, end = file.read_text(errors="replace").rpartition("\n<!-- ")
    return end == f"{hashlib.sha256(text.encode()).hexdigest()} -->\n"


if __name__ == "__main__":
    command.run(main, "lower --batch")
