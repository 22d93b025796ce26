"""Tiny tokenizers, whole pipelines and checkpoints on disk, made of `tests.tiny_models`.

Prompts of lower-case words work everywhere. Pictures are twice the latent's height and width, so
32x32 pixels are 16x16 latents; a video of 5 frames has 3 latent ones.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
    ViTImageProcessor,
)

from tests import tiny_models
from tests.tiny_models import TEXT_WIDTH, VOCABULARY, fill_randomly

WORDS = ("a", "the", "cat", "dog", "house", "river", "red", "blue", "small", "on", "near", "photo")


def make_bert_tokenizer() -> BertTokenizer:
    """A WordPiece tokenizer of `VOCABULARY` entries: letters, two-letter ends, some words."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *".,"]
    pieces += [word for word in WORDS if len(word) > 1]
    pieces += [f"##{letter}" for letter in string.ascii_lowercase]
    pieces += [f"##{a}{b}" for a in "aeiou" for b in "nrstlmcdgb"]
    pieces = pieces[:VOCABULARY]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=320)


def make_clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer of letters, 16 tokens long."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *string.digits, *".,"]
    pieces += [f"{piece}</w>" for piece in pieces[2:]]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h"), ("th", "e</w>")]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


def make_t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer of letters and some words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -6.0) for letter in string.ascii_lowercase + ".,"]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def make_vae(seed: int = 1, **changes: Any) -> AutoencoderKL:
    """An image autoencoder with four latent channels and half the size."""
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        **changes,
    )
    return fill_randomly(vae, seed)


def make_wan_vae(seed: int = 1) -> AutoencoderKLWan:
    """A video autoencoder with four latent channels, half the size and half the frames."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return fill_randomly(vae, seed)


def make_clip_text(seed: int = 2, *, projected: bool = False) -> CLIPTextModel:
    """CLIP's text tower; causal, so no family of encoders may take it."""
    tokenizer = make_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return fill_randomly(cls(config), seed)


def make_umt5(seed: int = 2) -> UMT5EncoderModel:
    """The text encoder of Wan."""
    config = UMT5Config(
        vocab_size=len(make_t5_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=6,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        attn_implementation="sdpa",
    )
    return fill_randomly(UMT5EncoderModel(config), seed)


def make_t5(seed: int = 3, *, width: int = TEXT_WIDTH) -> T5EncoderModel:
    """The long text encoder of FLUX and Stable Diffusion 3."""
    config = T5Config(
        vocab_size=len(make_t5_tokenizer()),
        d_model=width,
        d_kv=6,
        d_ff=16,
        num_layers=1,
        num_heads=2,
    )
    return fill_randomly(T5EncoderModel(config), seed)


def make_sd_pipeline(seed: int = 0, **unet_changes: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x, without a safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=make_vae(seed + 1),
        text_encoder=make_clip_text(seed + 2),
        tokenizer=make_clip_tokenizer(),
        unet=tiny_models.make_sd15_unet(seed, **unet_changes),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sdxl_pipeline(seed: int = 0, **unet_changes: Any) -> StableDiffusionXLPipeline:
    """SDXL; the two text encoders' widths add up to the UNet's."""
    settings: dict[str, Any] = {"cross_attention_dim": 2 * TEXT_WIDTH}
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(seed + 1),
        text_encoder=make_clip_text(seed + 2),
        text_encoder_2=make_clip_text(seed + 3, projected=True),
        tokenizer=make_clip_tokenizer(),
        tokenizer_2=make_clip_tokenizer(),
        unet=tiny_models.make_sdxl_unet(seed, **{**settings, **unet_changes}),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_wan_pipeline(
    seed: int = 0, *, two_stages: bool = False, ti2v: bool = False, **changes: Any
) -> WanPipeline:
    """Wan text-to-video.

    Args:
        seed: Of the weights.
        two_stages: Wan 2.2 A14B's two transformers, the second from timestep 700 down.
        ti2v: Wan 2.2 TI2V's one timestep for every token.
        changes: To the transformers' config.
    """
    second = tiny_models.make_wan(seed + 3, **changes) if two_stages else None
    pipeline = WanPipeline(
        tokenizer=make_t5_tokenizer(),
        text_encoder=make_umt5(seed + 2),
        vae=make_wan_vae(seed + 1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=tiny_models.make_wan(seed, **changes),
        transformer_2=second,
        boundary_ratio=0.7 if two_stages else None,
        expand_timesteps=ti2v,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """Everything FLUX.1 has; its latents are an eighth of the picture, then cut two by two."""
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
        shift_factor=0.0,
    )
    transformer = tiny_models.make_flux_dev(
        seed, in_channels=16, pooled_projection_dim=TEXT_WIDTH, joint_attention_dim=TEXT_WIDTH
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=fill_randomly(vae, seed + 1),
        transformer=transformer,
        text_encoder=make_clip_text(seed + 2),
        tokenizer=make_clip_tokenizer(),
        text_encoder_2=make_t5(seed + 3),
        tokenizer_2=make_t5_tokenizer(),
    )


def make_sd3_pipeline(seed: int = 0, **changes: Any) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium: CLIP's two texts side by side, as wide as T5's behind them."""
    settings: dict[str, Any] = {
        "joint_attention_dim": 2 * TEXT_WIDTH,
        "pooled_projection_dim": 2 * TEXT_WIDTH,
    }
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(seed + 1, shift_factor=0.1),
        transformer=tiny_models.make_sd35_medium(seed, **{**settings, **changes}),
        text_encoder=make_clip_text(seed + 2, projected=True),
        tokenizer=make_clip_tokenizer(),
        text_encoder_2=make_clip_text(seed + 3, projected=True),
        tokenizer_2=make_clip_tokenizer(),
        text_encoder_3=make_t5(seed + 4, width=2 * TEXT_WIDTH),
        tokenizer_3=make_t5_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_sd_pipeline(pipeline: Any, **changes: Any) -> torch.Tensor:
    """Latents of a seeded run of four steps; for Stable Diffusion and SDXL."""
    settings = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    return pipeline("a photo of a cat", **{"generator": generator, **settings, **changes}).images


def call_wan_pipeline(pipeline: Any, **changes: Any) -> torch.Tensor:
    """Latents `[1, 4, 3, 16, 16]` of a seeded run of four steps."""
    settings: dict[str, Any] = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 4,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    generator = torch.Generator().manual_seed(3)
    return pipeline("a photo of a cat", **{"generator": generator, **settings, **changes}).frames


def write_encoder_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A MiniLM-like checkpoint with its tokenizer, as `AutoModel` and `AutoTokenizer` load it."""
    tiny_models.make_minilm(seed, **changes).save_pretrained(folder)
    make_bert_tokenizer().save_pretrained(folder)
    return folder


def write_vit_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A DINOv2 checkpoint with registers and an image processor."""
    tiny_models.make_dinov2_with_registers(seed, **changes).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_pipeline(pipeline: Any, folder: Path) -> Path:
    """A whole pipeline as `DiffusionPipeline.from_pretrained` loads it."""
    pipeline.save_pretrained(folder)
    return folder
