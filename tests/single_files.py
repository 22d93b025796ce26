"""Checkpoints in one file under the public releases' names, made of tiny diffusers models."""

from __future__ import annotations

from torch import Tensor

State = dict[str, Tensor]

WAN_PARTS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "modulation",
    "proj_out": "head.head",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "norm2": "norm3",
}
UNET_PARTS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}


def name_wan_as_released(state: State) -> State:
    """diffusers' tensors of a Wan transformer, as in its public single file."""
    renamed = {}
    for name, tensor in state.items():
        new = _replace(name, WAN_PARTS)
        new = "head.modulation" if new == "modulation" else new
        renamed[f"model.diffusion_model.{new}"] = tensor
    return renamed


def name_stable_diffusion_as_released(unet: State, vae: State, text_encoder: State) -> State:
    """diffusers' tensors of Stable Diffusion 1.x (four levels, a VAE of two), as released."""
    renamed = {}
    for name, tensor in unet.items():
        renamed[f"model.diffusion_model.{_name_unet(name)}"] = tensor
    for name, tensor in vae.items():
        is_projection = ".attentions." in name and name.endswith("weight") and tensor.ndim == 2
        kept = tensor[..., None, None] if is_projection else tensor
        renamed[f"first_stage_model.{_name_vae(name)}"] = kept.contiguous()
    for name, tensor in text_encoder.items():
        inner = name if name.startswith("text_model.") else f"text_model.{name}"
        renamed[f"cond_stage_model.transformer.{inner}"] = tensor
    return renamed


def _name_unet(name: str) -> str:
    if ".resnets." in name:
        name = _replace(name, UNET_RESNET_PARTS)
    elif "transformer_blocks" in name or ".attentions." in name:
        return _replace(name, {**_unet_blocks(), **_only_mid()})
    return _replace(name, {**_unet_blocks(), **UNET_PARTS})


def _only_mid() -> dict[str, str]:
    return {key: value for key, value in UNET_PARTS.items() if key.startswith("mid_block")}


def _unet_blocks() -> dict[str, str]:
    blocks = {}
    for level in range(4):
        for i in range(2):
            blocks[f"down_blocks.{level}.resnets.{i}."] = f"input_blocks.{3 * level + i + 1}.0."
            blocks[f"down_blocks.{level}.attentions.{i}."] = f"input_blocks.{3 * level + i + 1}.1."
        for i in range(3):
            blocks[f"up_blocks.{level}.resnets.{i}."] = f"output_blocks.{3 * level + i}.0."
            blocks[f"up_blocks.{level}.attentions.{i}."] = f"output_blocks.{3 * level + i}.1."
        down = f"input_blocks.{3 * (level + 1)}.0.op."
        blocks[f"down_blocks.{level}.downsamplers.0.conv."] = down
        place = 1 if level == 0 else 2
        blocks[f"up_blocks.{level}.upsamplers.0."] = f"output_blocks.{3 * level + 2}.{place}."
    return blocks


def _name_vae(name: str) -> str:
    blocks = {}
    for level in range(2):
        for i in range(3):
            blocks[f"encoder.down_blocks.{level}.resnets.{i}."] = f"encoder.down.{level}.block.{i}."
            blocks[f"decoder.up_blocks.{level}.resnets.{i}."] = f"decoder.up.{1 - level}.block.{i}."
        blocks[f"down_blocks.{level}.downsamplers.0."] = f"down.{level}.downsample."
        blocks[f"up_blocks.{level}.upsamplers.0."] = f"up.{1 - level}.upsample."
    return _replace(name, {**blocks, **VAE_PARTS})


def _replace(name: str, parts: dict[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name
