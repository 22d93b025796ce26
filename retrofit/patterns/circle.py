"""Circles around the tokens of a picture, with keys pooled in squares beside them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.layout.grid import Place, TokenGrid, place_of, split_positions
from retrofit.patterns.base import Attended
from retrofit.patterns.call import AttentionCall
from retrofit.patterns.mask import Mask
from retrofit.runtime.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Circle(Mask):
    """The tokens of one frame that are nearer than a radius; borders cut the circle off.

    Paper: https://arxiv.org/abs/2412.16112 (section 3.2, with the pooled keys of its appendix).

    Attributes:
        layout: Of the tokens.
        radius: Distance in tokens at which a key is no longer seen.
        pool: Side of the squares of tokens whose keys and values are added up to one further key
            each, which all tokens of the grid see; None for none. The last ones may be short, and
            the weights of what they hold count the more.
        pool_weights: Weights of the tokens of a square, row by row; None for their mean.
    """

    is_shift_invariant: ClassVar[bool] = True
    name: ClassVar[str] = "clear"

    layout: TokenGrid
    radius: float
    pool: int | None = None
    pool_weights: tuple[float, ...] | None = None

    @property
    def sees_all(self) -> bool:
        """Whether no token is out of reach of any other, and none is pooled."""
        layout, reach = self.layout, self.radius**2
        farthest = (layout.height - 1) ** 2 + (layout.width - 1) ** 2
        return layout.frames == 1 and self.pool is None and farthest < reach

    @property
    def num_further_keys(self) -> int:  # type: ignore[override]
        """Squares of tokens that become one further key each."""
        if self.pool is None:
            return 0
        layout = self.layout
        return layout.frames * -(-layout.height // self.pool) * -(-layout.width // self.pool)

    def sees(self, query: Place, key: Place) -> Tensor:
        """By the distance, within a frame."""
        distance = (query.row - key.row) ** 2 + (query.column - key.column) ** 2
        return (distance < self.radius**2) & (query.frame == key.frame)

    def frame_pair(self, query: int, key: int) -> Hashable:
        """Whether they are one frame."""
        return query == key

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Pooled keys stand behind those of the sequence; special tokens don't see them."""
        seen = super().mask_mod(batch, head, query, key)
        _, is_query = place_of(self.layout, query)
        return torch.where(key < self.layout.num_tokens, seen, is_query)

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """As block lists.

        Raises:
            UnsupportedError: If the call has a mask beside pooled keys.
        """
        if call.attn_mask is not None and self.pool is not None:
            raise UnsupportedError(
                "clear: expected attention without a mask beside `pool`, which would add hidden "
                "keys up with others, got one. Leave `pool` out."
            )
        return super().attend(call, backend=backend, with_lse=with_lse)

    def further_keys(self, x: Tensor) -> Tensor:
        """Keys or values `[B, H, S, D]` of grid tokens added up in squares, `[B, H, n, D]`."""
        side = self.pool
        if side is None:
            return x[:, :, :0]
        _, height, width = self.layout.shape
        rows, columns = -(-height // side), -(-width // side)
        inside = min(side, height), min(side, width)
        short = (0, 0, 0, columns * inside[1] - width, 0, rows * inside[0] - height)
        _, tokens = split_positions(self.layout, x.device)
        maps = x.index_select(2, tokens).unflatten(2, self.layout.shape)
        maps = pad(maps, short) if any(short) else maps
        squares = maps.unflatten(4, (columns, inside[1])).unflatten(3, (rows, inside[0]))
        if self.pool_weights is None:
            weight = x.new_tensor(1 / side**2)
        else:
            weight = x.new_tensor(self.pool_weights).view(side, 1, side, 1)
            weight = weight[: inside[0], :, : inside[1]]
        pooled = (squares * weight).sum((4, 6))
        if height % side or width % side:
            held = _tokens_held(height, side)[:, None] * _tokens_held(width, side)
            pooled = pooled * (side**2 / held.double()).to(x.device, x.dtype)[:, :, None]
        return pooled.flatten(2, 4)


def _tokens_held(length: int, side: int) -> Tensor:
    """Tokens of each square along an axis, `[ceil(length / side)]`; the last may have fewer."""
    return (length - torch.arange(0, length, side, device="cpu")).clamp(max=side)
