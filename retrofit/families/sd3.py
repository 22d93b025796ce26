"""Picture transformers of Stable Diffusion 3 and 3.5, as in diffusers.

Picture and text stand in one sequence, the picture first. Some blocks of 3.5 medium attend a second
time, over the picture alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from retrofit.families.base import Family, find_attention, has_parts, own_part, takes_only
from retrofit.families.denoising import FoundAttention, list_sites
from retrofit.families.examples import Examples, InputSize, normal
from retrofit.families.flow_training import SD3
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import LayoutReader, Network, argument
from retrofit.runtime.errors import InputError

ARGUMENTS = {
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "block_controlnet_hidden_states",
    "joint_attention_kwargs",
    "return_dict",
    "skip_layers",
}
PARTS = ("pos_embed.proj", "time_text_embed", "context_embedder", "norm_out", "proj_out")


def recognises(module: nn.Module) -> bool:
    """Blocks over picture and text in one sequence, behind a patch embedding with its positions.

    The part that an IP-Adapter adds has attention of its own, which stays as it is.
    """
    if not has_parts(module, *PARTS, "transformer_blocks"):
        return False
    if not takes_only(module, "hidden_states", ARGUMENTS):
        return False
    blocks = own_part(module, "transformer_blocks")
    if not len(blocks) or not all(has_parts(block, "attn.add_k_proj") for block in blocks):
        return False
    adapter = own_part(module, "image_proj")
    own = set(find_attention(module)) - set(find_attention(adapter) if adapter else ())
    # attention elsewhere makes another architecture
    return {found.module for found in _attention_modules(module)} == own


def _attention_modules(module: Any) -> Iterator[FoundAttention]:
    """In order of execution: that of a whole block, then where there is one the picture's own."""
    for i, block in enumerate(module.transformer_blocks):
        path = f"transformer_blocks.{i}"
        yield FoundAttention(f"{path}.attn", block.attn, i, "joint", "picture and text")
        if has_parts(block, "attn2"):
            yield FoundAttention(f"{path}.attn2", block.attn2, i, "self", "picture")


def describe(module: Any) -> Network:
    """A site a block over picture and text, and one over the picture where the block has two."""
    sites, unreachable = list_sites(_attention_modules(module))
    side = module.config.sample_size
    return Network(
        family=FAMILY.name,
        sites=sites,
        readers={
            "picture": LayoutReader("", read_picture),
            "picture and text": LayoutReader("", read_picture_and_text),
        },
        sample_size=(side, side),
        unreachable=unreachable,
    )


def read_picture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The grid of latents `[B, C, H, W]` after the patch embedding."""
    _, _, height, width = argument(args, kwargs, 0, "hidden_states").shape
    patch = module.config.patch_size
    return TokenGrid(height=height // patch, width=width // patch)


def read_picture_and_text(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The same with the text `[B, S, C]` behind it."""
    picture = read_picture(module, args, kwargs)
    text = argument(args, kwargs, 1, "encoder_hidden_states")
    return TokenGrid(height=picture.height, width=picture.width, num_suffix_tokens=text.shape[1])


TEXT_LENGTH = 77 + 256  # as pipelines join CLIP's and T5's
PACKED = 2  # latents along a side of a patch
PROBES = (8, 16, 32, 64, 128)


def _probe_sizes(module: Any) -> tuple[InputSize, ...]:
    longest = module.config.pos_embed_max_size * module.config.patch_size
    return tuple(InputSize(height=side, width=side) for side in PROBES if side <= longest)


def _make_latents(module: Any, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    config = module.config
    longest = config.pos_embed_max_size * config.patch_size
    if max(size.height, size.width) > longest:
        raise InputError(
            f"{type(module).__name__}: expected at most {longest} latents a side, for which it has "
            f"positions, got {size}. Take a smaller --size."
        )
    return {
        "hidden_states": normal((1, config.in_channels, size.height, size.width), generator),
        "encoder_hidden_states": normal((1, TEXT_LENGTH, config.joint_attention_dim), generator),
        "pooled_projections": normal((1, config.pooled_projection_dim), generator),
        "timestep": torch.tensor([951.0]),
    }


FAMILY = Family(
    name="sd3",
    summary="picture transformers of Stable Diffusion 3 and 3.5 (medium, large, turbo)",
    examples=(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
    ),
    recognises=recognises,
    describe=describe,
    denoises=True,
    inputs=Examples(
        axes=("size",),
        native=lambda module: InputSize(
            height=module.config.sample_size, width=module.config.sample_size
        ),
        probes=_probe_sizes,
        make=_make_latents,
        latent_scale=(1, 8),
        packed=PACKED,
    ),
    training=SD3,
)
