"""Prompts and their embeddings, which never change: encoded once and cached, encoders dropped."""

import hashlib
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import disback
from runtime import files
from runtime.errors import must
from sdxl import layout, model

SHIPPED = Path(__file__).with_name("prompts.txt")


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, ended by line feeds alone; Refusal where
    there are none."""
    with files.blame(f"{file} cannot be read: name another --prompts, UTF-8 text, a prompt a line"):
        read = Path(file).expanduser().read_bytes().decode()
    lines = read.replace("\ufeff", "").split("\n")  # BOMs, also of files that were joined
    if any("\0" in line for line in lines):
        raise disback.Refusal(f"{file} is no text, or UTF-16: save it as UTF-8, a prompt a line")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise disback.Refusal(f"{file} is empty: it takes a prompt a line")
    return prompts


def embed(folder: Path, prompts: list[str], cache: Path,
          device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """text [prompts, 77, c] and pooled [prompts, p] on `device`, as diffusers' encode_prompt has
    them; from the cache where these prompts were embedded by these encoders before."""
    parts = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    read = sorted(file for part in parts for file in (
        *(folder / part).glob("*.json"), *(folder / part).glob("*.txt"),
        *(layout.weights(folder, part)[0] if part in layout.PARTS else ())))
    depends_on = repr([prompts, [(str(f.relative_to(folder)), files.sha256(f)) for f in read]])
    name = hashlib.sha256(depends_on.encode()).hexdigest()[:16]
    file = cache / f"sdxl-text-{name}.safetensors"
    if not file.exists():
        files.must_take_files(cache, "cache by DISBACK_CACHE", files.ROOM_OF_CACHE)
        files.save_tensors(file, encode(folder, prompts, device))
    with files.blame(f"{file} is broken: remove it, and it is made again"):
        bank = load_file(file)
        for name in ("text", "pooled"):
            if len(bank[name]) != len(prompts) or not bank[name].isfinite().all():
                raise ValueError(f"{name} is not finite, or of other prompts")
        return {name: tensor.to(device) for name, tensor in bank.items()}


@torch.no_grad()
def encode(folder: Path, prompts: list[str], device: torch.device | str) -> dict[str, Tensor]:
    """Both text encoders on all prompts; says how many are longer than they read."""
    with files.blame(f"text encoders or tokenizers in {folder} are broken: "
                     f"{layout.again(folder)}"):
        pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, unet=None, vae=None, **encoders(folder)).to(device)
        must_fit_together(pipe)
    note_long(prompts, pipe.tokenizer)
    parts = [pipe.encode_prompt(prompts[i:i + 16], do_classifier_free_guidance=False)
             for i in range(0, len(prompts), 16)]
    bank = {"text": torch.cat([part[0] for part in parts]).cpu(),
            "pooled": torch.cat([part[2] for part in parts]).cpu()}
    if not all(tensor.isfinite().all() for tensor in bank.values()):
        raise disback.Refusal(f"the text encoders in {folder} answer with what is not finite: "
                              f"{layout.again(folder)}")
    return bank


def must_fit_together(pipe: StableDiffusionXLPipeline) -> None:
    """Fail where a tokenizer does not fill or cut a prompt to CLIP's 77 tokens, or its encoder does
    not read as many, or all its words."""
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder),
                               (pipe.tokenizer_2, pipe.text_encoder_2)):
        reads, words = encoder.config.max_position_embeddings, encoder.config.vocab_size
        must(reads >= 77 and words >= len(tokenizer),
             f"an encoder reads {reads} tokens of {words} words, its tokenizer writes 77 of "
             f"{len(tokenizer)}")
        must(tokenizer.model_max_length == 77 and tokenizer.pad_token is not None,
             f"tokenizer_config.json: model_max_length {tokenizer.model_max_length}, pad_token "
             f"{tokenizer.pad_token}")


def encoders(folder: Path) -> dict:
    """Both text encoders of a pipeline's folder, as a pipeline takes them."""
    return {"text_encoder": model.load_part(CLIPTextModel, folder, "text_encoder"),
            "text_encoder_2": model.load_part(CLIPTextModelWithProjection, folder,
                                              "text_encoder_2")}


def note_long(prompts: list[str], tokenizer: CLIPTokenizer) -> None:
    """Say how many prompts are cut, where any is longer than the encoders read."""
    most = tokenizer.model_max_length
    long = sum(len(ids) > most for ids in tokenizer(prompts).input_ids)
    if long:
        print(f"note: {long} of {len(prompts)} prompts have over {most} tokens, of which the "
              f"first {most} count", file=sys.stderr)
