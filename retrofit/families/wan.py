"""Video transformers of Wan 2.1 and 2.2: text- and image-to-video, VACE, as in diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retrofit.families.base import (
    Family,
    find_attention,
    has_parts,
    own_part,
    takes_only,
)
from retrofit.families.denoising import FoundAttention, Kind, list_sites
from retrofit.families.examples import Examples, InputSize, normal
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import LayoutReader, Network, argument

ARGUMENTS = {
    "timestep",
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "control_hidden_states",
    "control_hidden_states_scale",
    "return_dict",
    "attention_kwargs",
}
KINDS: dict[str, Kind] = {"attn1": "self", "attn2": "cross"}


def recognises(module: nn.Module) -> bool:
    """A 3-D patch embedding, a condition embedder, and blocks with self- and cross-attention."""
    if not has_parts(module, "patch_embedding", "condition_embedder", "rope", "blocks"):
        return False
    if not isinstance(own_part(module, "patch_embedding"), nn.Conv3d):
        return False
    if not takes_only(module, "hidden_states", ARGUMENTS):
        return False
    blocks = [block for _, _, block in _blocks(module)]
    if not all(has_parts(block, "attn1", "attn2") for block in blocks):
        return False
    # attention elsewhere (faces, poses, references) makes another architecture
    listed = {attention for block in blocks for attention in (block.attn1, block.attn2)}
    return listed == set(find_attention(module))


def describe(module: Any) -> Network:
    """Two sites a block: self-attention over the video, cross-attention to the text."""
    sites, unreachable = list_sites(
        FoundAttention(
            f"{path}.{name}",
            attention := getattr(block, name),
            number,
            kind,
            "video",
            num_calls=2 if has_parts(attention, "add_k_proj") else 1,
        )
        for path, number, block in _blocks(module)
        for name, kind in KINDS.items()
    )
    return Network(
        family=FAMILY.name,
        sites=sites,
        readers={"video": LayoutReader("", read_latents)},
        has_frames=True,
        unreachable=unreachable,
    )


def _blocks(module: Any) -> list[tuple[str, int, Any]]:
    """Path, number and block, in order of execution: VACE's control blocks run before the others.

    The control blocks are numbered behind the others, which so keep the numbers they have in
    networks without control.
    """
    control = list(own_part(module, "vace_blocks") or [])
    main = [(f"blocks.{i}", i, block) for i, block in enumerate(module.blocks)]
    return [(f"vace_blocks.{i}", len(main) + i, block) for i, block in enumerate(control)] + main


def read_latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The grid of latents `[B, C, F, H, W]` after the patch embedding."""
    _, _, frames, height, width = argument(args, kwargs, 0, "hidden_states").shape
    patch_frames, patch_height, patch_width = module.config.patch_size
    return TokenGrid(
        frames=frames // patch_frames, height=height // patch_height, width=width // patch_width
    )


TEXT_LENGTH = 512  # diffusers tells image from text tokens by it
PROBES = ((2, 8, 8), (3, 16, 16), (5, 32, 32), (3, 64, 64), (3, 64, 112))


def _probe_sizes(module: Any) -> tuple[InputSize, ...]:
    _, rows, columns = module.config.patch_size
    return tuple(
        InputSize(frames=frames, height=height // 2 * rows, width=width // 2 * columns)
        for frames, height, width in PROBES
    )


def _one_patch(module: Any) -> InputSize:
    _, rows, columns = module.config.patch_size
    return InputSize(height=rows, width=columns)


def _make_latents(module: Any, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    config = module.config
    shape = (size.frames, size.height, size.width)
    with_image = config.image_dim is not None
    text = (1, TEXT_LENGTH if with_image else 64, config.text_dim)
    inputs = {
        "hidden_states": normal((1, config.in_channels, *shape), generator),
        "timestep": torch.tensor([951]),
        "encoder_hidden_states": normal(text, generator),
    }
    if with_image:
        # with a position table for a first and a last picture, one row each
        both = config.pos_embed_seq_len
        image = (1, 257, config.image_dim) if both is None else (2, both // 2, config.image_dim)
        inputs["encoder_hidden_states_image"] = normal(image, generator)
    if "vace_in_channels" in config:
        control = (1, config.vace_in_channels, *shape)
        inputs["control_hidden_states"] = normal(control, generator)
    return inputs


FAMILY = Family(
    name="wan",
    summary="Wan 2.1 and 2.2 video transformers: text- and image-to-video, VACE",
    examples=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    recognises=recognises,
    describe=describe,
    denoises=True,
    inputs=Examples(
        axes=("size", "frames"),
        native=lambda module: InputSize(frames=21, height=60, width=104),
        probes=_probe_sizes,
        make=_make_latents,
        least=_one_patch,
        latent_scale=(4, 8),
    ),
)
