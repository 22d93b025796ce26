"""Sizes of the DINOv2 vision transformer that VGGT and Pi3 use as patch embedding."""

from __future__ import annotations

from dataclasses import dataclass, field

from retrofit.architectures.sections import Section, divisible, positive


@dataclass(frozen=True, kw_only=True)
class DinoConfig(Section):
    """A DINOv2 with register tokens; the defaults are ViT-L/14's at 518 pixels."""

    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4
    interpolate_antialias: bool = True
    interpolate_offset: float = 0.0
    block_chunks: int = 0
    init_values: float | None = field(default=1.0, metadata={"optional": True})

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        found = positive(
            self, "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"
        )
        if self.num_register_tokens < 0:
            found.append(
                f"num_register_tokens: must not be below 0, got {self.num_register_tokens}."
            )
        if self.block_chunks:
            found.append(
                f"block_chunks: expected 0, got {self.block_chunks}. Blocks saved in chunks have"
                " other names; save the checkpoint without them."
            )
        if found:
            return found
        found += divisible(self.embed_dim, self.num_heads, "embed_dim (of num_heads)")
        return found + divisible(self.img_size, self.patch_size, "img_size (of patch_size)")


PRESETS = {
    "dinov2_vits14_reg": DinoConfig(embed_dim=384, depth=12, num_heads=6),
    "dinov2_vitb14_reg": DinoConfig(embed_dim=768, depth=12, num_heads=12),
    "dinov2_vitl14_reg": DinoConfig(),
}
