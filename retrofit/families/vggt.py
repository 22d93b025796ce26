"""VGGT's aggregator: blocks within a frame and over all frames in turn, ours or the original's."""

from __future__ import annotations

from typing import Any

from torch import nn

from retrofit.families.base import Family, has_parts
from retrofit.families.examples import VIEWS
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, LayoutReader, Network, argument


def recognises(module: nn.Module) -> bool:
    """Frame blocks and global blocks over camera and register tokens."""
    return has_parts(module, "frame_blocks", "global_blocks", "camera_token", "register_token")


def describe(module: Any) -> Network:
    """Frame and global sites in the order in which they run."""
    sites = [
        AttentionSite(
            path=f"{name}.{i}.attn",
            index=i,
            block=2 * i + turn,
            kind="self",
            num_heads=block.attn.num_heads,
            head_dim=block.attn.qkv.in_features // block.attn.num_heads,
            scope="frame" if name == "frame_blocks" else "global",
            layout="views",
        )
        for turn, name in enumerate(("frame_blocks", "global_blocks"))
        for i, block in enumerate(getattr(module, name))
    ]
    return Network(
        family=FAMILY.name,
        sites=tuple(sorted(sites, key=lambda site: site.block)),
        readers={"views": LayoutReader("", read_views)},
    )


def read_views(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The grid of images `[B, N, 3, H, W]`: N frames of patches behind their special tokens."""
    _, frames, _, height, width = argument(args, kwargs, 0, "images").shape
    # the original keeps these on the module, ours in its config
    patch = getattr(module, "patch_size", None) or module.config.patch_size
    special = 1 + module.register_token.shape[2]
    return TokenGrid(
        frames=frames,
        height=height // patch,
        width=width // patch,
        num_frame_prefix_tokens=special,
    )


FAMILY = Family(
    name="vggt",
    summary="VGGT: cameras, depth and points from many views",
    examples=("facebook/VGGT-1B",),
    recognises=recognises,
    describe=describe,
    inputs=VIEWS,
    behind="the camera, depth and point heads",
)
