"""UNets of Stable Diffusion 1.x, 2.x, XL and Turbo, and their ControlNets, as in diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from retrofit.families.base import Family, find_attention, find_multihead, has_parts
from retrofit.families.denoising import FoundAttention, Kind, list_sites
from retrofit.families.examples import Examples, InputSize, normal
from retrofit.families.unet2d_training import TRAINING
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import LayoutReader, Level, Network, argument
from retrofit.runtime.errors import UnsupportedError


def recognises(module: nn.Module) -> bool:
    """Down blocks with resnets, and either up blocks or a ControlNet's taps.

    All attention in these blocks must be over one feature map, alone or with a text: temporal
    layers, gated ones and text tokens among the keys of self-attention are other architectures.
    """
    if not has_parts(module, "conv_in", "down_blocks", "time_embedding"):
        return False
    if not (has_parts(module, "up_blocks") or has_parts(module, "controlnet_down_blocks")):
        return False
    parts = [block for _, block, _ in _parts(module)]
    if not all(_pairs_up(block) for block in parts):
        return False
    listed = {found.module for found in _attention_modules(module)}
    return (
        listed == {attention for part in parts for attention in find_attention(part)}
        and not any(has_parts(attention, "added_kv_proj_dim") for attention in listed)
        and not any(find_multihead(part) for part in parts)
    )


def describe(module: Any) -> Network:
    """List the sites in order of execution, and the levels by resolution."""
    found = list(_attention_modules(module))
    sites, unreachable = list_sites(found)
    return Network(
        family=FAMILY.name,
        sites=sites,
        levels=_levels(module),
        readers={site.layout: LayoutReader(site.layout, read_feature_map) for site in found},
        sample_size=_pair(getattr(module.config, "sample_size", None)),
        unreachable=unreachable | find_multihead(module),
    )


def read_feature_map(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The grid of a feature map `[B, C, H, W]`, one token a position."""
    _, _, height, width = argument(args, kwargs, 0, "hidden_states").shape
    return TokenGrid(height=height, width=width)


def _attention_modules(module: Any) -> Iterator[FoundAttention]:
    """In order of execution; their layouts are named after the module that sees the size."""
    block = 0
    for prefix, part, level in _parts(module):
        for i, holder in enumerate(getattr(part, "attentions", None) or []):
            source = f"{prefix}.attentions.{i}"
            if has_parts(holder, "to_q"):  # an attention that takes the feature map itself
                yield _found(source, holder, block, source, level)
                block += 1
            for j, transformer in enumerate(getattr(holder, "transformer_blocks", None) or []):
                for name in ("attn1", "attn2"):
                    attention = getattr(transformer, name, None)
                    if attention is not None:
                        path = f"{source}.transformer_blocks.{j}.{name}"
                        yield _found(path, attention, block, source, level)
                block += 1


def _found(path: str, attention: Any, block: int, source: str, level: int) -> FoundAttention:
    kind: Kind = "cross" if attention.is_cross_attention else "self"
    return FoundAttention(path, attention, block, kind, source, level)


def _parts(module: Any) -> Iterator[tuple[str, Any, int]]:
    """Blocks in order of execution, with their level."""
    depth = len(module.down_blocks)
    for i, part in enumerate(module.down_blocks):
        yield f"down_blocks.{i}", part, i
    if module.mid_block is not None:
        yield "mid_block", module.mid_block, depth - 1
    for i, part in enumerate(getattr(module, "up_blocks", None) or []):
        yield f"up_blocks.{i}", part, depth - 1 - i


def _pairs_up(part: Any) -> bool:
    """Whether a block is made of resnets, each followed by one attention at most."""
    resnets, attentions = getattr(part, "resnets", None), getattr(part, "attentions", None)
    return resnets is not None and len(attentions or resnets) in (len(resnets), len(resnets) - 1)


def _levels(module: Any) -> tuple[Level, ...]:
    down, up = module.down_blocks, getattr(module, "up_blocks", None)
    levels, scale = [], 1
    for i, part in enumerate(down):
        mirror = len(down) - 1 - i
        levels.append(
            Level(
                index=i,
                scale=scale,
                has_attention=bool(getattr(part, "attentions", None)),
                down_pairs=_pair_ends(f"down_blocks.{i}", part),
                up_pairs=_pair_ends(f"up_blocks.{mirror}", up[mirror]) if up else (),
                downsampler=_sampler(f"down_blocks.{i}", part, "downsamplers"),
                # the way back to this level stands at the end of the next deeper up block
                upsampler=_sampler(f"up_blocks.{mirror - 1}", up[mirror - 1], "upsamplers")
                if up and mirror
                else None,
            )
        )
        scale *= 2 if levels[-1].downsampler else 1
    return tuple(levels)


def _pair_ends(prefix: str, part: Any) -> tuple[str, ...]:
    kind = "attentions" if getattr(part, "attentions", None) else "resnets"
    return tuple(f"{prefix}.{kind}.{i}" for i in range(len(part.resnets)))


def _sampler(prefix: str, part: Any, name: str) -> str | None:
    return f"{prefix}.{name}.0" if getattr(part, name, None) else None


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _native_size(module: Any) -> InputSize:
    height, width = _pair(getattr(module.config, "sample_size", None)) or (64, 64)
    return InputSize(height=height, width=width)


def _probe_sizes(module: Any) -> tuple[InputSize, ...]:
    native, deepest = _native_size(module), 2 ** (len(module.down_blocks) - 1)
    sides = [max(deepest, native.height * step // 4 // deepest * deepest) for step in (2, 4, 8)]
    return tuple(InputSize(height=side, width=side) for side in sides)


def _make_latents(module: Any, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    config = module.config
    width = config.cross_attention_dim
    width = config.encoder_hid_dim or (width if isinstance(width, int) else width[0])
    inputs: dict[str, Any] = {
        "sample": normal((1, config.in_channels, size.height, size.width), generator),
        "timestep": torch.tensor(951),
        "encoder_hidden_states": normal((1, 77, width), generator),
    }
    if config.addition_embed_type == "text_time":
        # the network only sees the two concatenated, so six sizes also fit one trained with five
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pixels = (8.0 * size.height, 8.0 * size.width)
        inputs["added_cond_kwargs"] = {
            "text_embeds": normal((1, text), generator),
            "time_ids": torch.tensor([[*pixels, 0.0, 0.0, *pixels]]),
        }
    elif config.addition_embed_type not in (None, "text"):
        raise UnsupportedError(
            f"{type(module).__name__}: no example inputs for addition_embed_type "
            f"{config.addition_embed_type!r}. Use --no-proof."
        )
    if getattr(config, "num_class_embeds", None) is not None:
        inputs["class_labels"] = torch.zeros(1, dtype=torch.int64)
    if has_parts(module, "controlnet_cond_embedding"):
        sides = len(config.conditioning_embedding_out_channels) - 1
        picture = (1, config.conditioning_channels, size.height << sides, size.width << sides)
        inputs["controlnet_cond"] = normal(picture, generator)
    return inputs


FAMILY = Family(
    name="unet2d",
    summary="UNets of Stable Diffusion 1.x, 2.x, XL and Turbo, and their ControlNets",
    examples=(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "stabilityai/sdxl-turbo",
    ),
    recognises=recognises,
    describe=describe,
    denoises=True,
    training=TRAINING,
    inputs=Examples(
        axes=("size",),
        native=_native_size,
        probes=_probe_sizes,
        make=_make_latents,
        latent_scale=(1, 8),
    ),
)
