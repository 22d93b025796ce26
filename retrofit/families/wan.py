"""Video transformers of Wan 2.1 and 2.2, text- and image-to-video, as in diffusers."""

from __future__ import annotations

from typing import Any

from torch import nn

from retrofit.families.base import Family, has_parts
from retrofit.grid import TokenGrid
from retrofit.sites import AttentionSite, Network, argument


def recognises(module: nn.Module) -> bool:
    """A 3-D patch embedding, a condition embedder, and blocks with self- and cross-attention."""
    if not has_parts(module, "patch_embedding", "condition_embedder", "rope", "blocks"):
        return False
    if not isinstance(module.patch_embedding, nn.Conv3d):
        return False
    return all(has_parts(block, "attn1", "attn2") for block in module.blocks)  # type: ignore[union-attr]


def describe(module: Any) -> Network:
    """Two sites a block: self-attention over the video, cross-attention to the text."""
    sites = []
    for i, block in enumerate(module.blocks):
        for name in ("attn1", "attn2"):
            attention = getattr(block, name)
            sites.append(
                AttentionSite(
                    path=f"blocks.{i}.{name}",
                    index=i,
                    block=i,
                    kind="self" if name == "attn1" else "cross",
                    num_heads=attention.heads,
                    head_dim=attention.inner_dim // attention.heads,
                    grid_source="",
                    num_calls=1 if attention.add_k_proj is None else 2,
                )
            )
    unreachable = {
        f"blocks.{i}.{name}": f"its attention backend is {backend}, which is not PyTorch's"
        for i, block in enumerate(module.blocks)
        for name in ("attn1", "attn2")
        if (backend := _foreign_backend(getattr(block, name).processor))
    }
    return Network(
        family=FAMILY.name,
        sites=tuple(sites),
        grid_readers={"": read_latents},
        unreachable=unreachable,
    )


def read_latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
    """The grid of latents `[B, C, F, H, W]` after the patch embedding."""
    _, _, frames, height, width = argument(args, kwargs, 0, "hidden_states").shape
    patch_frames, patch_height, patch_width = module.config.patch_size
    return TokenGrid(
        frames=frames // patch_frames, height=height // patch_height, width=width // patch_width
    )


def _foreign_backend(processor: Any) -> str | None:
    backend = getattr(processor, "_attention_backend", None)
    name = getattr(backend, "value", backend)
    return None if name is None or str(name).startswith(("native", "_native")) else str(name)


FAMILY = Family(
    name="wan",
    summary="Wan 2.1 and 2.2 video transformers, text- and image-to-video",
    examples=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    recognises=recognises,
    describe=describe,
    denoises=True,
)
