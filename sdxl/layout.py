"""Where a pipeline's files lie: a local folder of diffusers' layout, or the hub's."""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open

import disback
from runtime import files
from runtime.errors import must
from sdxl import tiny

# What is read of a pipeline's folder: these, and each part's weights under diffusers' names.
TEXTS = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
         "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json")
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model", "text_encoder_2": "model"}
HUB = (f"the hub (into {HF_HUB_CACHE}, by "
       f"{'HF_HUB_CACHE' if os.environ.get('HF_HUB_CACHE') else 'HF_HOME'})")
AROUND_UNET = [part for part in PARTS if part != "unet"]


def weights(folder: Path, part: str) -> tuple[list[Path], str | None]:
    """The files of a part's weights, a whole or shards, in fp32 or else in fp16, and diffusers'
    name for that. Those that are missing are named as well."""
    stem = folder / part / PARTS[part]
    names = re.compile(re.escape(stem.name) + r"(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors")
    found = sorted(file for file in stem.parent.glob("*") if names.fullmatch(file.name))
    full = [file for file in found if ".fp16" not in file.name]
    variant = "fp16" if found and not full else None
    index = Path(f"{stem}.safetensors.index{'.fp16' if variant else ''}.json")
    chosen = full or found or [Path(f"{stem}.safetensors")]
    if any("-of-" in file.name for file in chosen):
        if not index.is_file():
            return [index], variant
        with files.blame(f"{index} is broken: {again(index)}"):
            names = set(files.load_json(index, again(index))["weight_map"].values())
            must(names and not any(Path(name).name != name for name in names), "it names no files")
        whole = [file for file in chosen if "-of-" not in file.name]  # some libraries prefer it
        chosen = sorted({*whole, *(stem.parent / name for name in names)})
    elif found and index.is_file() and stem.name == "diffusion_pytorch_model":
        raise disback.Refusal(f"{index} is left of shards that are not here, and diffusers heeds "
                              f"it: {again(index, 'remove it')}")
    return chosen, variant


def read(folder: Path, parts: Collection[str] = PARTS) -> list[Path]:
    """The files that decide what the model is, but for the tokenizers'."""
    return [*(folder / name for name in TEXTS),
            *(file for part in parts for file in weights(folder, part)[0])]


def patterns(end: str, parts: Collection[str]) -> list[str]:
    """What is fetched from the hub: no ONNX, no Flax, and of fp32 and fp16 one."""
    return [*TEXTS, "tokenizer*/*", *(
        f"{part}/{PARTS[part]}{name}" for part in parts
        for name in (f"{end}.safetensors", f"{end}-*-of-*.safetensors",
                     f".safetensors.index{end}.json"))]


def missing(folder: Path, parts: Collection[str]) -> list[str]:
    """The files that a pipeline's folder lacks."""
    lacking = [str(file.relative_to(folder)) for file in read(folder, parts) if not file.is_file()]
    for name in ("tokenizer", "tokenizer_2"):  # transformers 5 writes the one file, the hub has two
        words = [] if (folder / name / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
        lacking += [f"{name}/{file}" for file in ("tokenizer_config.json", *words)
                    if not (folder / name / file).is_file()]
    return lacking


def on_hub(name: str) -> bool:
    """Whether the hub may be asked for it: OWNER/NAME that is no place here, nor meant as one."""
    owner, _, rest = name.partition("/")
    return (all(re.fullmatch(r"\w[\w.-]*", word) for word in (owner, rest))
            and owner != "runs" and not Path(owner).exists()
            and Path(rest).suffix not in (".safetensors", ".ckpt", ".bin", ".pt"))


def again(place: Path, otherwise: str = "fetch or save it again") -> str:
    """What helps against a broken file or folder of a pipeline: who made it decides. The hub's
    library fetches nothing again that its cache has. `otherwise` it is the user's."""
    for folder in (place, *place.parents):
        if re.fullmatch(tiny.NAME + "[0-9a-f]{16}", folder.name):
            return f"remove {folder}, and it is made again"
        if folder.name.startswith("models--") and "snapshots" in place.relative_to(folder).parts:
            return f"remove {folder}, and it is fetched again"
    return otherwise


def must_be_pipeline(folder: Path, flag: str) -> None:
    """Refuse the pipeline of another model, or for another use."""
    kind = files.load_json(folder / "model_index.json", again(folder)).get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise disback.Refusal(f"{folder} is not SDXL but {kind}: name an SDXL base model by {flag}")


def fetch(model: str, parts: Collection[str], look: Callable) -> Path:
    """The folder of a model of the hub. Its kind is looked at before its weights are fetched, which
    have gigabytes: in fp32, or else in fp16."""
    folder = Path(snapshot_download(model, allow_patterns=patterns("", ())))
    if missing(folder, ()):
        return folder
    look(folder)
    for end in ("", ".fp16"):
        folder = Path(snapshot_download(model, allow_patterns=patterns(end, parts)))
        if not missing(folder, parts):
            break
    return folder


def find(model: str, cache: Path, flag: str = "--model", parts: Collection[str] = PARTS,
         look: Callable = must_be_pipeline) -> Path:
    """The folder of `model`: the tiny pipeline's where it is empty, itself where it is a folder,
    and what the hub has under that name, fetched on first use, where it is not. Refuses, naming the
    `flag` that takes another, another kind of pipeline, and what lacks a file or has a broken one;
    of weights only those of `parts` are fetched and looked at. look(folder, flag) refuses more."""
    folder = Path(model).expanduser() if model else tiny.folder(cache)
    if folder.is_file():
        raise disback.Refusal(
            f"{folder} is a single file: if it is a whole checkpoint, convert it by diffusers, "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER), and name "
            f"that folder by {flag}")
    takes = f"{flag} takes OWNER/NAME of the hub, or an SDXL pipeline's folder as diffusers has it"
    wanted = ", ".join([*TEXTS, *(f"{part}/{PARTS[part]}.safetensors" for part in parts),
                        "tokenizer/* and tokenizer_2/*"])
    if not folder.is_dir():
        if not on_hub(model):
            raise disback.Refusal(f"{model or folder} is no folder here: {takes}: {wanted}")
        with files.blame(f"model {model} is no folder here and was not to be had from {HUB}: "
                         f"fetch it where there is a network, logged in if it is gated; {takes}: "
                         f"{wanted}"):
            folder = fetch(model, parts, lambda folder: look(folder, flag))
    if lacking := missing(folder, parts):
        if (folder / "model_index.json").is_file():  # another kind lacks what SDXL has
            must_be_pipeline(folder, flag)
        others = [str(file.relative_to(folder)) for part in parts
                  for kind in ("*.bin", "*.*.safetensors")
                  for file in sorted((folder / part).glob(kind)) if file not in read(folder)]
        kept = (f"; {others[0]} is to be saved again as safetensors by diffusers, whose only "
                "variant that is read is fp16") if others else ""
        if not Path(model).expanduser().is_dir():  # of the hub
            takes = f"the hub's {model} has no such file, or was fetched in part; {takes}"
        raise disback.Refusal(f"{folder} lacks {', '.join(lacking)}{kept}: "
                              + (takes if model else again(folder)))
    for part in parts:
        for file in weights(folder, part)[0]:
            with files.blame(f"{file} is broken: {again(file)}"):
                safe_open(file, "pt")
    vae_scale(folder)
    look(folder, flag)
    return folder


def vae_scale(folder: Path) -> int:
    """Pixels, across, of an image for each of its latents."""
    file = folder / "vae" / "config.json"
    with files.blame(f"{file} is no VAE's of SDXL: {again(file)}"):
        config = files.load_json(file, again(file))
        factor = config.get("scaling_factor", 1)  # without one diffusers has its own
        must(type(factor) in (int, float) and 1e-6 < factor < 1e6, f"scaling_factor {factor!r}")
        must(config.get("latent_channels", 4) == 4, "its latents have not SDXL's 4 channels")
        return 2 ** (len(config["block_out_channels"]) - 1)
