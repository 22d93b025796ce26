"""The parts of the small text-to-image pipeline, untrained: Stable Diffusion 1.5's, made narrow.

The UNet has the blocks of Stable Diffusion 1.5, two layers each, so every module has the name it
has there; only the widths differ.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from draw import COLORS, SHAPES, TEXTURES, TONES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 128  # side of a training picture, pixels
LATENT = SIZE // 8
TEXT_LENGTH = 24  # tokens, with start and end
TEXT_WIDTH = 96
OTHER_WORDS = (
    *("a", "an", "of", "on", "in", "at", "the", "with", "and"),
    *("picture", "photo", "drawing", "image", "small", "large"),
    *("top", "bottom", "left", "right", "center", "background"),
)
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Return the words the tokenizer knows whole, in the order of their token numbers."""
    return [*SHAPES, *COLORS, *TEXTURES, *TONES, *OTHER_WORDS]


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that byte-pair encoders of this kind write bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]


def write_tokenizer(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`: single bytes, and merges that spell the known words."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: list[str] = []
    for word in words():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            # Joined from the right: a piece that ends in </w> is no prefix of another word's.
            left, right = parts[-2:]
            parts[-2:] = [left + right]
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
    tokens += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder for the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder: factor 8, 4 channels.

    It has no attention in the middle: what becomes of a spot must not depend on the
    size of the picture.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Return an untrained UNet with Stable Diffusion 1.5's blocks; all heads are 16 wide."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        layers_per_block=2,
        block_out_channels=(48, 80, 96, 96),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 5, 6, 6),  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Return the noise schedule of Stable Diffusion, without clipping."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """Return the pipeline made of these parts."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
