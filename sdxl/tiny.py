"""A complete SDXL pipeline of random weights, small enough for a laptop's CPU and for the tests:
the same classes and the same files as the real one, so that the same code runs both."""

import contextlib
import hashlib
import inspect
import json
import os
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import disback
from runtime import files, ranks
from sdxl import quiet  # noqa: F401  (every part of sdxl imports this one)

NAME = "sdxl-tiny-"  # of the folder, before its hash


def folder(cache: Path) -> Path:
    """The folder of the pipeline's files in `cache`, made where it is not there yet."""
    source = "".join(map(inspect.getsource, (pipeline, unet, text_encoder, tokenizer)))
    name = hashlib.sha256((source + diffusers.__version__ + torch.__version__).encode()).hexdigest()
    made = cache / f"{NAME}{name[:16]}"
    if not made.exists():
        if ranks.rank() > 0:  # transformers writes on the first rank alone, which was here first
            raise disback.Refusal(f"{made} is not here, though the first rank has made it: name "
                                  "one cache for all ranks by DISBACK_CACHE")
        files.must_take_files(cache, "cache by DISBACK_CACHE", files.ROOM_OF_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        with files.blame(f"cannot write {made}"), tempfile.TemporaryDirectory(
                files.UNFINISHED, f".{made.name}.", cache) as folder_beside, \
                files.asking_for_room(folder_beside):
            beside = Path(folder_beside, made.name)
            pipeline().save_pretrained(beside)
            for file in beside.rglob("*.safetensors"):
                os.chmod(file, 0o666 & ~files.UMASK)  # safetensors leaves 0600
            with contextlib.suppress(OSError):  # another process was first
                os.replace(beside, made)
    return made


def pipeline() -> StableDiffusionXLPipeline:
    """The pipeline in memory; its weights do not depend on torch's random state, nor change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            sample_size=32, scaling_factor=0.13025, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2)
        encoder, encoder_2 = text_encoder(CLIPTextModel), text_encoder(CLIPTextModelWithProjection)
        return StableDiffusionXLPipeline(
            vae=vae.eval(), unet=unet().eval(), text_encoder=encoder, text_encoder_2=encoder_2,
            tokenizer=tokenizer("<|endoftext|>"), tokenizer_2=tokenizer("!"),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                num_train_timesteps=1000, prediction_type="epsilon", steps_offset=1,
                timestep_spacing="leading"),
            force_zeros_for_empty_prompt=True)


def unet() -> UNet2DConditionModel:
    """261,684 parameters, in SDXL's manner: attention in the inner blocks, text and time added."""
    return UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1), use_linear_projection=True, cross_attention_dim=32,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16)


def text_encoder(kind: type) -> torch.nn.Module:
    """One of SDXL's two CLIP text encoders; of the second the pooled output is used as well."""
    # eos is set as 2, the default, would make it pool the old way, at the largest token.
    config = CLIPTextConfig(
        vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=16, bos_token_id=0,
        eos_token_id=1, pad_token_id=1,
        hidden_act="quick_gelu" if kind is CLIPTextModel else "gelu")
    return kind(config).eval()


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer, whose words here are the bytes and four merges of them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - 188)]
    merges = ["t h", "th e</w>", "i n", "a n"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges]
    with tempfile.TemporaryDirectory() as made:
        vocab, rules = Path(made, "vocab.json"), Path(made, "merges.txt")
        vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        rules.write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer(str(vocab), str(rules), pad_token=pad, model_max_length=77)
