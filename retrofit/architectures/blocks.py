"""Attention, feed-forward and the pre-norm block that VGGT, Pi3 and DINOv2 are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrofit.architectures.rotary import Rotation, rotate

QK_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Self-attention with optional q/k normalisation and rotary positions.

    Queries and keys are normalised, then rotated, and reach
    `torch.nn.functional.scaled_dot_product_attention` as `[B, H, S, D]`.

    Args:
        dim: Width of the tokens.
        num_heads: Heads; the head dim is `dim / num_heads`.
        qk_norm: Normalise queries and keys per head (LayerNorm, eps 1e-5, affine).
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False) -> None:
        """Build the projections."""
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            tokens: `[B, S, C]`.
            rotation: Positions of the sequence, the same for every batch row; None for none.

        Returns:
            `[B, S, C]`.
        """
        batch, seq_len, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, seq_len, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, S, D] each
        # Under autocast the norms return float32 while the values are in half precision.
        query = self._place(self.q_norm(query), rotation).to(value.dtype)
        key = self._place(self.k_norm(key), rotation).to(value.dtype)
        out = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, seq_len, dim))

    @staticmethod
    def _place(tokens: Tensor, rotation: Rotation | None) -> Tensor:
        return tokens if rotation is None else rotate(tokens, rotation)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None) -> None:
        """Build the layers; `out_dim` is `dim` if None."""
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[..., dim]` to `[..., out_dim]`."""
        return self.fc2(functional.gelu(self.fc1(tokens)))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int, init_value: float) -> None:
        """Start every factor at `init_value`."""
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scale `[..., dim]`."""
        return tokens * self.gamma


class Block(nn.Module):
    """`x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`.

    Args:
        dim: Width of the tokens.
        num_heads: Heads.
        mlp_ratio: Hidden width of the feed-forward, relative to `dim`.
        eps: Of the two block norms.
        qk_norm: Normalise queries and keys.
        init_values: Start of the layer scales, None for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
        qk_norm: bool = False,
        init_values: float | None = None,
    ) -> None:
        """Build the parts."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    def forward(self, tokens: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Map `[B, S, C]` to `[B, S, C]`."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens), rotation))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))
