"""From frames to patch tokens: a plain convolution, or a DINOv2 with register tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrofit.architectures.blocks import Block
from retrofit.architectures.dino_config import DinoConfig
from retrofit.runtime.errors import InputError

DINO_EPS = 1e-6


class ConvPatchEmbed(nn.Module):
    """One strided convolution; a token per patch, in raster order."""

    def __init__(self, patch_size: int, dim: int) -> None:
        """Build the convolution for RGB frames."""
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        """Map `[N, 3, H, W]` to `[N, (H / patch) (W / patch), C]`."""
        return self.proj(frames).flatten(2).transpose(1, 2)


class DinoPatchEmbed(nn.Module):
    """DINOv2 with registers (https://arxiv.org/abs/2309.16588), its normalised patch tokens only.

    Args:
        config: Sizes.
        mask_token: Keep the (unused) mask token, which VGGT's checkpoint has and Pi3's has not.
    """

    def __init__(self, config: DinoConfig, *, mask_token: bool = True) -> None:
        """Build the transformer with DINOv2's initial values."""
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.patch_embed = ConvPatchEmbed(config.patch_size, dim)
        num_patches = (config.img_size // config.patch_size) ** 2
        self.cls_token = small_parameter(1, 1, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + 1, dim))
        self.register_tokens = (
            small_parameter(1, config.num_register_tokens, dim)
            if config.num_register_tokens
            else None
        )
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                eps=DINO_EPS,
                init_values=config.init_values,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=DINO_EPS)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Map `[N, 3, H, W]` to normalised patch tokens `[N, (H / patch) (W / patch), C]`."""
        count, _, height, width = frames.shape
        size = height // self.config.patch_size, width // self.config.patch_size
        table = self.position_table(*size)
        patches = self.patch_embed(frames) + table[:, 1:]
        special = [(self.cls_token + table[:, :1]).expand(count, -1, -1)]
        if self.register_tokens is not None:
            special.append(self.register_tokens.expand(count, -1, -1))
        tokens = torch.cat([*special, patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 1 + self.config.num_register_tokens :])

    def position_table(self, height: int, width: int) -> Tensor:
        """The learned positions for a grid of patches.

        Returned verbatim for the trained square, else resampled in float32 (bicubic), by size or,
        with an `interpolate_offset`, by a scale factor.

        Args:
            height: Rows of patches.
            width: Columns of patches.

        Returns:
            `[1, 1 + height * width, C]`, the class token's first, in the dtype of the table.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if height == width == side:
            return self.pos_embed
        table = self.pos_embed.float()
        patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        offset = self.config.interpolate_offset
        scale = ((height + offset) / side, (width + offset) / side) if offset else None
        patches = functional.interpolate(
            patches,
            size=None if offset else (height, width),
            scale_factor=scale,
            mode="bicubic",
            antialias=self.config.interpolate_antialias,
        )
        patches = patches.permute(0, 2, 3, 1).reshape(1, height * width, -1)
        return torch.cat([table[:, :1], patches], dim=1).to(self.pos_embed.dtype)


def small_parameter(*shape: int) -> nn.Parameter:
    """A learned token as the originals start it: normal, standard deviation 1e-6.

    Drawn with `trunc_normal_`, since `normal_` on the meta device imports the whole compiler.
    """
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=1e-6))


def check_frames(images: Tensor, patch_size: int, where: str) -> tuple[int, int]:
    """Refuse images that a patch grid does not fit.

    Args:
        images: `[B, N, 3, H, W]`.
        patch_size: Pixels per patch side.
        where: Name of the model for the message.

    Returns:
        Rows and columns of patches.

    Raises:
        InputError: If there is another number of axes or channels, no frame, or a side that is no
            multiple of the patch size.
    """
    if images.ndim != 5 or images.shape[2] != 3 or images.shape[1] < 1:
        raise InputError(
            f"{where}: expected images [batch, frames, 3, height, width], got"
            f" {list(images.shape)}. Stack the views on axis 1."
        )
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise InputError(
            f"{where}: expected sides that are multiples of {patch_size} pixels, got"
            f" {width}x{height}. Fit the images with retrofit.architectures.images.load_images."
        )
    return height // patch_size, width // patch_size
