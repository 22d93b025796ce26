"""Two-dimensional rotary position embedding: half of a head turns with y, half with x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of a sequence, `[S, 2, D / 4]` each; axis 1 is (y, x)."""

    cos: Tensor
    sin: Tensor

    def repeat(self, count: int) -> Rotation:
        """The same positions, `count` times one after the other."""
        return Rotation(self.cos.repeat(count, 1, 1), self.sin.repeat(count, 1, 1))


def grid_positions(
    height: int, width: int, *, num_special_tokens: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Positions of one frame: special tokens at (0, 0), patches from (1, 1) on.

    Args:
        height: Rows of patches.
        width: Columns of patches.
        num_special_tokens: Tokens in front of the patches; position 0 leaves them unrotated.
        device: Where to build them.

    Returns:
        int64 `[num_special_tokens + height * width, 2]`, (y, x), patches in raster order.
    """
    y = torch.arange(1, height + 1, device=device).repeat_interleave(width)
    x = torch.arange(1, width + 1, device=device).repeat(height)
    special = torch.zeros(num_special_tokens, 2, dtype=torch.int64, device=device)
    return torch.cat([special, torch.stack([y, x], dim=-1)])


def build_rotation(
    positions: Tensor, head_dim: int, *, base: float = 100.0, dtype: torch.dtype = torch.float32
) -> Rotation:
    """Angles `position * base^(-2i / (D / 2))`, i = 0 .. D/4 - 1, on each axis.

    Computed in float32 and rounded once. (The original rounds the angles to the dtype of the
    tokens first, which in bfloat16 is wrong by up to an eighth of a radian at position 37.)

    Args:
        positions: int64 `[S, 2]`, (y, x).
        head_dim: D, a multiple of 4.
        base: Base of the frequencies.
        dtype: Dtype of the result.
    """
    exponents = torch.arange(0, head_dim // 2, 2, device=positions.device).float()
    frequencies = 1.0 / base ** (exponents / (head_dim // 2))
    angles = positions.float()[:, :, None] * frequencies
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(tokens: Tensor, rotation: Rotation) -> Tensor:
    """Turn channel i of a half together with channel i + D/4 of it.

    Args:
        tokens: Queries or keys, `[B, H, S, D]`.
        rotation: Of the same sequence.

    Returns:
        `[B, H, S, D]`, contiguous, in the dtype of `tokens`.
    """
    batch, heads, seq_len, head_dim = tokens.shape
    pairs = tokens.reshape(batch, heads, seq_len, 2, 2, head_dim // 4)  # ..., (y, x), pair, D/4
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    cos, sin = rotation.cos.to(tokens.dtype), rotation.sin.to(tokens.dtype)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return turned.reshape(batch, heads, seq_len, head_dim)
