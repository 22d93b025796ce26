"""Pi3: a decoder that attends within a frame and over all frames in turn, ours or theirs."""

from __future__ import annotations

from typing import Any

from torch import nn

from retrofit.families.base import Family, has_parts
from retrofit.families.examples import VIEWS
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, LayoutReader, Network, argument


def recognises(module: nn.Module) -> bool:
    """An encoder, one list of decoder blocks over register tokens, and the heads' decoders."""
    parts = ("encoder", "decoder", "register_token", "point_decoder", "camera_decoder")
    return has_parts(module, *parts) and isinstance(module.decoder, nn.ModuleList)


def describe(module: Any) -> Network:
    """Decoder sites: even ones within a frame, odd ones over all frames."""
    sites = tuple(
        AttentionSite(
            path=f"decoder.{i}.attn",
            index=i // 2,
            block=i,
            kind="self",
            num_heads=block.attn.num_heads,
            head_dim=block.attn.qkv.in_features // block.attn.num_heads,
            scope="global" if i % 2 else "frame",
            layout="views",
        )
        for i, block in enumerate(module.decoder)
    )
    return Network(family=FAMILY.name, sites=sites, readers={"views": LayoutReader("", read_views)})


def read_views(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The grid of images `[B, N, 3, H, W]` or `[N, 3, H, W]`."""
    name = "images" if "images" in kwargs else "imgs"  # ours, the original's
    *_, frames, _, height, width = argument(args, kwargs, 0, name).shape
    patch = getattr(module, "patch_size", None) or module.config.encoder.patch_size
    return TokenGrid(
        frames=frames,
        height=height // patch,
        width=width // patch,
        num_frame_prefix_tokens=module.register_token.shape[2],
    )


FAMILY = Family(
    name="pi3",
    summary="Pi3: points and cameras from many views, in any order",
    examples=("yyfz233/Pi3",),
    recognises=recognises,
    describe=describe,
    inputs=VIEWS,
    behind="the decoders and heads",
)
