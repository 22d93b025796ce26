"""Tiny networks with random weights, one for each architecture that a family knows.

All are the real classes of transformers and diffusers, made from configs, seeded, in eval mode and
float32. `FAMILY_MODELS` lists them once with inputs, for tests that run over every family.
Tokenizers, whole pipelines and checkpoints on disk: `tests.tiny_pipelines`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    ControlNetModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

Inputs = dict[str, Any]
VOCABULARY = 120
TEXT_WIDTH = 12
WAN_TEXT_LENGTH = 512  # diffusers splits image from text tokens at this length


class FamilyModel(NamedTuple):
    """One row of `FAMILY_MODELS`.

    Attributes:
        family: Name of the family that must recognise the model.
        make_model: `make_model(**changes) -> nn.Module`; changes go into the config.
        make_inputs: `make_inputs(batch=1, odd=False, seed=0) -> dict` of keyword arguments; `odd`
            gives a size that neither blocks nor windows divide.
        call: `call(model, inputs) -> Tensor`, the output as one tensor.
    """

    family: str
    make_model: Callable[..., nn.Module]
    make_inputs: Callable[..., Inputs]
    call: Callable[[Any, Inputs], Tensor]


def fill_randomly(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a seeded value that matters, zero-initialised ones too.

    Linear maps keep the size of what they map, and queries and keys are large enough for attention
    to be far from uniform: with the libraries' own initial values dropping keys changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim < 2:
            offset = 1.0 if name.endswith("weight") or "lambda" in name else 0.0
            noise = offset + 0.1 * noise
        else:
            noise = noise / math.sqrt(math.prod(parameter.shape[1:]))
            sharp = any(part in name for part in ("to_q.", "q_proj.", "query.", "q_lin."))
            noise = 3.0 * noise if sharp else noise
        parameter.data.copy_(noise)
    return model.eval()


BERT_CONFIG: Inputs = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 320,
    "attn_implementation": "sdpa",
}


def make_bert(seed: int = 0, **changes: Any) -> BertModel:
    """BERT, two layers."""
    return fill_randomly(BertModel(BertConfig(**{**BERT_CONFIG, **changes})), seed)


def make_minilm(seed: int = 0, **changes: Any) -> BertModel:
    """The shape of all-MiniLM-L6 in small: six layers, twelve heads."""
    settings: Inputs = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 12}
    return make_bert(seed, **{**settings, **changes})


def make_roberta(seed: int = 0, **changes: Any) -> RobertaModel:
    """RoBERTa, two layers; the padding token is 1."""
    settings = {**BERT_CONFIG, "num_attention_heads": 2, "max_position_embeddings": 322}
    return fill_randomly(RobertaModel(RobertaConfig(**{**settings, **changes})), seed)


def make_distilbert(seed: int = 0, **changes: Any) -> DistilBertModel:
    """DistilBERT, two layers."""
    settings: Inputs = {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 320,
        "attn_implementation": "sdpa",
    }
    return fill_randomly(DistilBertModel(DistilBertConfig(**{**settings, **changes})), seed)


def make_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A language model of two layers, whose heads share keys two by two."""
    settings: Inputs = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 320,
        "attn_implementation": "sdpa",
    }
    return fill_randomly(LlamaForCausalLM(LlamaConfig(**{**settings, **changes})), seed)


def make_text_inputs(
    batch: int = 1, odd: bool = False, seed: int = 0, *, length: int | None = None
) -> Inputs:
    """Token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    length = length or (67 if odd else 64)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_padded_text_inputs(batch: int = 2, odd: bool = False, seed: int = 0) -> Inputs:
    """Token ids whose rows have different lengths: at least two rows, all but the first padded."""
    inputs = make_text_inputs(max(batch, 2), odd, seed)
    for row in range(1, len(inputs["input_ids"])):
        inputs["attention_mask"][row, -5 * row :] = 0
        inputs["input_ids"][row, -5 * row :] = 1
    return inputs


def _vision(changes: Inputs, **more: Any) -> Inputs:
    settings: Inputs = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 4,
        "attn_implementation": "sdpa",
    }
    return {**settings, **more, **changes}


def make_vit(seed: int = 0, **changes: Any) -> ViTModel:
    """ViT: a class token before 8x8 patches."""
    return fill_randomly(ViTModel(ViTConfig(**_vision(changes))), seed)


def make_deit(seed: int = 0, **changes: Any) -> DeiTModel:
    """DeiT: a class and a distillation token before 8x8 patches."""
    return fill_randomly(DeiTModel(DeiTConfig(**_vision(changes))), seed)


def make_dinov2(seed: int = 0, **changes: Any) -> Dinov2Model:
    """DINOv2: a class token before 8x8 patches."""
    settings = _vision(changes)
    del settings["intermediate_size"]
    return fill_randomly(Dinov2Model(Dinov2Config(**{"mlp_ratio": 2, **settings})), seed)


def make_dinov2_with_registers(seed: int = 0, **changes: Any) -> Dinov2WithRegistersModel:
    """DINOv2 with a class and four register tokens before 8x8 patches."""
    settings = _vision(changes)
    del settings["intermediate_size"]
    config = Dinov2WithRegistersConfig(**{"mlp_ratio": 2, **settings})
    return fill_randomly(Dinov2WithRegistersModel(config), seed)


def make_clip_vision(seed: int = 0, **changes: Any) -> CLIPVisionModel:
    """The vision tower of CLIP: a class token before 8x8 patches."""
    return fill_randomly(CLIPVisionModel(CLIPVisionConfig(**_vision(changes))), seed)


def make_siglip_vision(seed: int = 0, **changes: Any) -> SiglipVisionModel:
    """SigLIP's vision tower: 8x8 patches, no special token, an attention-pooling head."""
    return fill_randomly(SiglipVisionModel(SiglipVisionConfig(**_vision(changes))), seed)


def make_picture_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """Pictures of 32x32 pixels, or 44x28 (11x7 patches of 4) when `odd`."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (44, 28) if odd else (32, 32)
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=generator)}


def make_interpolated_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """The same for models that must be told to interpolate their positions."""
    inputs = make_picture_inputs(batch, odd, seed)
    return {**inputs, "interpolate_pos_encoding": True} if odd else inputs


SD15_CONFIG: Inputs = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL_CONFIG: Inputs = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
}
WAN_CONFIG: Inputs = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
FLUX_CONFIG: Inputs = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "axes_dims_rope": (2, 2, 4),
}
SD3_CONFIG: Inputs = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 24,
    "pooled_projection_dim": TEXT_WIDTH,
    "pos_embed_max_size": 32,
}


def make_sd15_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A UNet laid out as in Stable Diffusion 1.x: four levels, attention in the upper three."""
    return fill_randomly(UNet2DConditionModel(**{**SD15_CONFIG, **changes}), seed)


def make_sd21_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """As in Stable Diffusion 2.x: heads grow with the channels, linear projections."""
    settings: Inputs = {"attention_head_dim": (1, 2, 2, 2), "use_linear_projection": True}
    return make_sd15_unet(seed, **{**settings, **changes})


def make_sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A UNet laid out as in SDXL: three levels, none at the top, several blocks a transformer."""
    return fill_randomly(UNet2DConditionModel(**{**SDXL_CONFIG, **changes}), seed)


def make_controlnet(seed: int = 0, **changes: Any) -> ControlNetModel:
    """A ControlNet for `make_sd15_unet`; its picture has twice the latent's height and width."""
    copied = {k: v for k, v in SD15_CONFIG.items() if not k.startswith(("sample", "out_", "up_"))}
    settings: Inputs = {"conditioning_embedding_out_channels": (4, 8)}
    return fill_randomly(ControlNetModel(**{**copied, **settings, **changes}), seed)


def make_unet_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """Latents of 16x16, or 19x26 when `odd` (3x4 at the deepest level); seven text tokens."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (19, 26) if odd else (16, 16)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": 501,
        "encoder_hidden_states": torch.randn(batch, 7, TEXT_WIDTH, generator=generator),
    }


def make_sdxl_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """The same with SDXL's pooled text and picture sizes."""
    inputs = make_unet_inputs(batch, odd, seed)
    height, width = inputs["sample"].shape[-2:]
    sizes = torch.tensor([[8.0 * height, 8.0 * width, 0.0, 0.0, 8.0 * height, 8.0 * width]])
    pooled = torch.randn(batch, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    return {
        **inputs,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(batch, -1)},
    }


def make_controlnet_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """The same with a control picture."""
    inputs = make_unet_inputs(batch, odd, seed)
    height, width = inputs["sample"].shape[-2:]
    generator = torch.Generator().manual_seed(seed + 1)
    picture = torch.rand(batch, 3, 2 * height, 2 * width, generator=generator)
    return {**inputs, "controlnet_cond": picture}


def make_wan(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Wan 2.1 text-to-video, two blocks."""
    return fill_randomly(WanTransformer3DModel(**{**WAN_CONFIG, **changes}), seed)


def make_wan_i2v(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Wan 2.1 image-to-video: cross-attention to a picture's tokens beside the text's."""
    settings: Inputs = {"added_kv_proj_dim": 24, "image_dim": 20, "in_channels": 9}
    return make_wan(seed, **{**settings, **changes})


def make_wan_vace(seed: int = 0, **changes: Any) -> WanVACETransformer3DModel:
    """Wan VACE: a control branch of two further blocks, which run first."""
    settings: Inputs = {"vace_layers": [0, 2], "vace_in_channels": 6, "num_layers": 3}
    model = WanVACETransformer3DModel(**{**WAN_CONFIG, **settings, **changes})
    return fill_randomly(model, seed)


def make_wan_inputs(
    batch: int = 1, odd: bool = False, seed: int = 0, *, channels: int = 4
) -> Inputs:
    """Latents of 3 frames of 8x8 (4x4 patches), or 5 of 14x6 (7x3 patches) when `odd`."""
    generator = torch.Generator().manual_seed(seed)
    size = (5, 14, 6) if odd else (3, 8, 8)
    return {
        "hidden_states": torch.randn(batch, channels, *size, generator=generator),
        "timestep": torch.full((batch,), 701),
        "encoder_hidden_states": torch.randn(batch, 9, TEXT_WIDTH, generator=generator),
    }


def make_wan_i2v_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """The same with a picture's tokens, and the text padded to the length diffusers expects."""
    inputs = make_wan_inputs(batch, odd, seed, channels=9)
    generator = torch.Generator().manual_seed(seed + 1)
    text = torch.randn(batch, WAN_TEXT_LENGTH, TEXT_WIDTH, generator=generator)
    picture = torch.randn(batch, 11, 20, generator=generator)
    return {**inputs, "encoder_hidden_states": text, "encoder_hidden_states_image": picture}


def make_wan_ti2v_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """Wan 2.2 TI2V: one timestep a token, 0 for those of a given first frame."""
    inputs = make_wan_inputs(batch, odd, seed)
    frames, height, width = inputs["hidden_states"].shape[2:]
    timestep = torch.full((batch, frames, (height // 2) * (width // 2)), 701)
    timestep[:, 0] = 0
    return {**inputs, "timestep": timestep.flatten(1)}


def make_wan_vace_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """The same as text-to-video with control latents."""
    inputs = make_wan_inputs(batch, odd, seed)
    size = inputs["hidden_states"].shape[2:]
    control = torch.randn(batch, 6, *size, generator=torch.Generator().manual_seed(seed + 1))
    return {**inputs, "control_hidden_states": control}


def make_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """FLUX.1 schnell: one block of two streams, two of one."""
    return fill_randomly(FluxTransformer2DModel(**{**FLUX_CONFIG, **changes}), seed)


def make_flux_dev(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """FLUX.1 dev and Kontext, which take the guidance as an input."""
    return make_flux(seed, **{"guidance_embeds": True, **changes})


def make_flux_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """Pictures of 8x8 tokens, or 11x7 when `odd`, behind nine tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (11, 7) if odd else (8, 8)
    return {
        "hidden_states": torch.randn(batch, height * width, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 9, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, TEXT_WIDTH, generator=generator),
        "timestep": torch.full((batch,), 0.701),
        "img_ids": make_position_ids(height, width),
        "txt_ids": torch.zeros(9, 3),
    }


def make_position_ids(height: int, width: int, kind: int = 0) -> Tensor:
    """What FLUX's pipelines call image ids: kind, row and column of every token, `[N, 3]`."""
    rows, columns = torch.arange(height), torch.arange(width)
    return torch.cartesian_prod(torch.tensor([kind]), rows, columns).float()


def make_kontext_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """The same as `make_flux_inputs` with a reference picture of 5x6 tokens, and a guidance."""
    inputs = make_flux_inputs(batch, odd, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    reference = torch.randn(batch, 30, 4, generator=generator)
    return {
        **inputs,
        "hidden_states": torch.cat([inputs["hidden_states"], reference], 1),
        "img_ids": torch.cat([inputs["img_ids"], make_position_ids(5, 6, kind=1)]),
        "guidance": torch.full((batch,), 2.5),
    }


def make_sd3(seed: int = 0, **changes: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3: three blocks, the last of which drops the text."""
    return fill_randomly(SD3Transformer2DModel(**{**SD3_CONFIG, **changes}), seed)


def make_sd35_medium(seed: int = 0, **changes: Any) -> SD3Transformer2DModel:
    """3.5 medium: normalised queries and keys; two blocks attend to the picture alone as well."""
    return make_sd3(seed, **{"qk_norm": "rms_norm", "dual_attention_layers": (0, 1), **changes})


def make_sd3_inputs(batch: int = 1, odd: bool = False, seed: int = 0) -> Inputs:
    """FLUX's text with latents of 16x16 (8x8 patches), or 22x15 (11x7) when `odd`."""
    inputs = make_flux_inputs(batch, odd, seed)
    height, width = (22, 15) if odd else (16, 16)
    latents = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))
    kept = ("encoder_hidden_states", "pooled_projections", "timestep")
    return {"hidden_states": latents, **{name: inputs[name] for name in kept}}


@torch.no_grad()
def call_transformers(model: Any, inputs: Inputs) -> Tensor:
    """Hidden states `[B, S, C]`, zeros for padding, which nobody reads."""
    hidden = model(**inputs).last_hidden_state
    mask = inputs.get("attention_mask")
    return hidden if mask is None else hidden * mask[..., None]


@torch.no_grad()
def call_language_model(model: Any, inputs: Inputs) -> Tensor:
    """Logits of the next tokens, `[B, S, V]`."""
    return model(**inputs).logits


@torch.no_grad()
def call_diffusers(model: Any, inputs: Inputs) -> Tensor:
    """The predicted noise or velocity, shaped as the latents."""
    return model(**inputs, return_dict=False)[0]


@torch.no_grad()
def call_controlnet(model: Any, inputs: Inputs) -> Tensor:
    """All residuals of a ControlNet in one row a sample."""
    down, middle = model(**inputs, return_dict=False)
    return torch.cat([residual.flatten(1) for residual in (*down, middle)], dim=1)


FAMILY_MODELS: dict[str, FamilyModel] = {
    "bert": FamilyModel("encoder", make_bert, make_text_inputs, call_transformers),
    "bert-padded": FamilyModel("encoder", make_bert, make_padded_text_inputs, call_transformers),
    "minilm": FamilyModel("encoder", make_minilm, make_padded_text_inputs, call_transformers),
    "roberta": FamilyModel("encoder", make_roberta, make_padded_text_inputs, call_transformers),
    "distilbert": FamilyModel(
        "encoder", make_distilbert, make_padded_text_inputs, call_transformers
    ),
    "llama": FamilyModel("causal-lm", make_llama, make_text_inputs, call_language_model),
    "vit": FamilyModel("vit", make_vit, make_interpolated_inputs, call_transformers),
    "deit": FamilyModel("vit", make_deit, make_interpolated_inputs, call_transformers),
    "dinov2": FamilyModel("vit", make_dinov2, make_picture_inputs, call_transformers),
    "dinov2-registers": FamilyModel(
        "vit", make_dinov2_with_registers, make_picture_inputs, call_transformers
    ),
    "clip-vision": FamilyModel(
        "vit", make_clip_vision, make_interpolated_inputs, call_transformers
    ),
    "siglip-vision": FamilyModel(
        "vit", make_siglip_vision, make_interpolated_inputs, call_transformers
    ),
    "sd15": FamilyModel("unet2d", make_sd15_unet, make_unet_inputs, call_diffusers),
    "sd21": FamilyModel("unet2d", make_sd21_unet, make_unet_inputs, call_diffusers),
    "sdxl": FamilyModel("unet2d", make_sdxl_unet, make_sdxl_inputs, call_diffusers),
    "controlnet": FamilyModel("unet2d", make_controlnet, make_controlnet_inputs, call_controlnet),
    "wan-t2v": FamilyModel("wan", make_wan, make_wan_inputs, call_diffusers),
    "wan-i2v": FamilyModel("wan", make_wan_i2v, make_wan_i2v_inputs, call_diffusers),
    "wan-ti2v": FamilyModel("wan", make_wan, make_wan_ti2v_inputs, call_diffusers),
    "wan-vace": FamilyModel("wan", make_wan_vace, make_wan_vace_inputs, call_diffusers),
    "flux": FamilyModel("flux", make_flux, make_flux_inputs, call_diffusers),
    "flux-kontext": FamilyModel("flux", make_flux_dev, make_kontext_inputs, call_diffusers),
    "sd3": FamilyModel("sd3", make_sd3, make_sd3_inputs, call_diffusers),
    "sd35-medium": FamilyModel("sd3", make_sd35_medium, make_sd3_inputs, call_diffusers),
}
