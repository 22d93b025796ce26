"""VGGT's trunk: patch embedding, then blocks that attend within a frame and over all frames.

Paper: https://arxiv.org/abs/2503.11651, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from retrofit.architectures.blocks import Block
from retrofit.architectures.dino_config import DinoConfig
from retrofit.architectures.patch_embed import (
    ConvPatchEmbed,
    DinoPatchEmbed,
    check_frames,
    small_parameter,
)
from retrofit.architectures.rotary import Rotation, build_rotation, grid_positions
from retrofit.architectures.vggt_config import AggregatorConfig
from retrofit.layout.grid import TokenGrid

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Aggregator(nn.Module):
    """Alternates `frame_blocks[i]` and `global_blocks[i]`.

    The tokens of a frame are camera, registers, patches in raster order. A frame block sees
    `[B * N, P, C]`; a global block sees `[B, N * P, C]`, frame after frame, as `grid` says.

    Args:
        config: Sizes.
        dino: The DINOv2 patch embedding, None for a convolution.

    Attributes:
        num_special_tokens: Camera and register tokens in front of every frame (5 in VGGT-1B).
    """

    def __init__(self, config: AggregatorConfig, dino: DinoConfig | None = None) -> None:
        """Build the blocks with the original's initial values."""
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.num_special_tokens = 1 + config.num_register_tokens
        self.patch_embed = DinoPatchEmbed(dino) if dino else ConvPatchEmbed(config.patch_size, dim)
        self.frame_blocks = nn.ModuleList(self._build_block() for _ in range(config.depth))
        self.global_blocks = nn.ModuleList(self._build_block() for _ in range(config.depth))
        # Slot 0 is for the reference frame, slot 1 for all others.
        self.camera_token = small_parameter(1, 2, 1, dim)
        self.register_token = small_parameter(1, 2, config.num_register_tokens, dim)

    def _build_block(self) -> Block:
        config = self.config
        return Block(
            config.embed_dim,
            config.num_heads,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.qk_norm,
            init_values=config.init_values,
        )

    def grid(self, image_shape: Iterable[int]) -> TokenGrid:
        """Layout of the sequence that every global block sees for images of this shape.

        Args:
            image_shape: `[B, N, 3, H, W]` of the images given to `forward`.
        """
        _, frames, _, height, width = image_shape
        patch = self.config.patch_size
        return TokenGrid(
            frames=frames,
            height=height // patch,
            width=width // patch,
            num_frame_prefix_tokens=self.num_special_tokens,
        )

    def forward(
        self,
        images: Tensor,
        layers: Iterable[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> dict[int, Tensor]:
        """Run the trunk and keep the layers asked for.

        Args:
            images: `[B, N, 3, H, W]` in [0, 1]; H and W are multiples of the patch size.
            layers: Which layers to keep; None for the last. What is kept is what costs memory:
                `B * N * P * 2C` numbers per layer.
            device: Where they are kept, None for where they are computed.

        Returns:
            Layer to tokens `[B, N, P, 2C]`: output of the frame block, then of the global block.

        Raises:
            InputError: If the images do not have that shape.
        """
        patch_grid = check_frames(images, self.config.patch_size, "VGGT")
        batch, frames = images.shape[:2]
        tokens = self.embed(images)
        rotation = self._rotation(patch_grid, tokens)
        rotations = {"frame": rotation, "global": rotation.repeat(frames)}
        wanted = {self.config.depth - 1} if layers is None else set(layers)
        outputs: dict[int, Tensor] = {}
        group = self.config.aa_block_size
        for start in range(0, self.config.depth, group):
            halves: dict[tuple[str, int], Tensor] = {}
            for kind in self.config.aa_order:
                for layer in range(start, start + group):
                    tokens = self._run_block(kind, layer, tokens, rotations[kind], batch)
                    if layer in wanted:
                        halves[kind, layer] = tokens
            for layer in sorted(wanted & set(range(start, start + group))):
                joined = torch.cat([halves["frame", layer], halves["global", layer]], dim=-1)
                outputs[layer] = joined.unflatten(0, (batch, frames)).to(device or joined.device)
        return outputs

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block, `[B * N, P, C]`: camera, registers, patches."""
        patches = self.embed_patches(images)
        batch, frames = images.shape[:2]
        slots = torch.arange(frames, device=patches.device).clamp(max=1)
        special = torch.cat([self.camera_token, self.register_token], dim=2)[0, slots]
        special = special.expand(batch, -1, -1, -1).flatten(0, 1)  # [B * N, 5, C]
        return torch.cat([special, patches], dim=1)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Patch tokens of images `[B, N, 3, H, W]` in [0, 1]: `[B * N, h * w, C]`."""
        frames = images.flatten(0, 1)
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        mean, std = (frames.new_tensor(value).view(3, 1, 1) for value in (IMAGE_MEAN, IMAGE_STD))
        return self.patch_embed(((frames - mean) / std).to(self.camera_token.dtype))

    def positions(self, height: int, width: int) -> Tensor:
        """Positions of one frame's tokens, int64 `[P, 2]`, for a grid of patches."""
        return grid_positions(height, width, num_special_tokens=self.num_special_tokens)

    def _rotation(self, patch_grid: tuple[int, int], tokens: Tensor) -> Rotation:
        positions = self.positions(*patch_grid).to(tokens.device)
        head_dim = self.config.embed_dim // self.config.num_heads
        return build_rotation(
            positions, head_dim, base=self.config.rope_freq, dtype=self.camera_token.dtype
        )

    def _run_block(
        self, kind: str, layer: int, tokens: Tensor, rotation: Rotation, batch: int
    ) -> Tensor:
        """One block over `[B * N, P, C]`."""
        if kind == "frame":
            return self.frame_blocks[layer](tokens, rotation)
        sequence = tokens.reshape(batch, -1, tokens.shape[-1])
        return self.global_blocks[layer](sequence, rotation).reshape(tokens.shape)
