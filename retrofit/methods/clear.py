"""CLEAR: every token of a picture sees the tokens in a circle around it, and all of the text.

Paper: https://arxiv.org/abs/2412.16112 (section 3.2, with the pooled keys of its appendix). The
paper distils the weights for it; without that, as here, the output degrades. Departures: texts of
any length; in a grid of several frames a circle stays in its own; where squares of `pool` tokens do
not fill the grid the last ones are short, and the weights of what they hold count the more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import block_sparse_attention
from retrofit.layout.grid import TokenGrid, kept_pairs, split_positions
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import DENSE, Method, Operator
from retrofit.methods.block_layout import full_mask, mask_rows
from retrofit.methods.circle_tiles import PLACES, circle_lists
from retrofit.methods.run_state import RunState
from retrofit.runtime.errors import ConfigError, UnsupportedError

POOLED_LENGTH = 10  # by which the original multiplies the tokens of a call that has pooled keys


@dataclass(frozen=True, kw_only=True)
class ClearConfig(Method):
    """Settings of CLEAR. The paper distils the model for them first; without, expect a loss.

    Attributes:
        radius: Tokens nearer than this are seen, borders cut the circle off. 1 is the token itself;
            a radius beyond the grid's diagonal is dense. The paper has 8, 16 and 32. In a video a
            circle stays in its frame.
        pool: Side of the squares of tokens whose keys and values are added up to one further key
            each, which all tokens of the picture see. Those at the right and at the bottom may be
            short. None for none; the paper has 4.
        pool_weights: Weights of the tokens of a square, row by row, as the distillation has learnt
            them. None for their mean.
        temperature_base: Tokens N0 of the training size, text included (4608 for FLUX). A call of N
            tokens (N ten times as many with `pool`) gets the scale sqrt(log_N0(N) / head_dim); 0
            keeps the model's own.
    """

    name: ClassVar[str] = "clear"
    summary: ClassVar[str] = "every token of a picture sees a circle around it, and all of the text"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.16112"
    helps: ClassVar[str] = (
        "from pictures of 1024x1024 on (64x64 tokens), and on weights distilled for it"
    )
    acts_with: ClassVar[str] = "a smaller radius"
    lossy: ClassVar[str] = (
        "lossy: the paper distils the weights for it; without that the output degrades, the more "
        "the smaller the radius"
    )

    radius: float = 16.0
    pool: int | None = None
    pool_weights: tuple[float, ...] | None = None
    temperature_base: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: With every mistake at once.
        """
        problems = []
        if not 0 < self.radius < math.inf:
            problems.append(f"radius: expected more than 0 and finite, got {self.radius}.")
        if self.pool is not None and self.pool < 1:
            problems.append(f"pool: expected 1 or more, got {self.pool}.")
        problems += self._check_weights()
        if self.temperature_base < 0 or self.temperature_base == 1:
            problems.append(
                f"temperature_base: expected 0 or at least 2 tokens, got {self.temperature_base}."
            )
        if problems:
            raise ConfigError(" ".join(problems))

    def _check_weights(self) -> list[str]:
        """What is wrong with the weights of a square."""
        number = 0 if self.pool_weights is None else len(self.pool_weights)
        if self.pool_weights is None or (self.pool is not None and number == self.pool**2):
            return []
        if self.pool is None:
            side = math.isqrt(number)
            fitting = f", {side} for these" if side and side**2 == number else ""
            return [
                f"pool_weights: says how tokens are pooled, and nothing pools them. Set `pool` to "
                f"the side of the squares{fitting}, or leave pool_weights out."
            ]
        return [
            f"pool_weights: expected {self.pool**2} weights, pool x pool = {self.pool} x "
            f"{self.pool} of them row by row, got {number}."
        ]

    def refuses(self, network: Network) -> str | None:
        """Needs attention over a grid."""
        if any(site.kind != "cross" and site.layout is not None for site in network.sites):
            return None
        return "it needs attention over a grid of known height and width"

    def build(self, site: AttentionSite, grid: TokenGrid, state: RunState) -> Operator:
        """The circles of this grid."""
        circles = Circles(config=self, grid=grid)
        return DENSE if circles.sees_all and not self.temperature_base else circles


@dataclass(frozen=True, kw_only=True)
class Circles:
    """The operator for one grid.

    Attributes:
        config: The method's settings.
        grid: Layout of the tokens.
    """

    config: ClearConfig
    grid: TokenGrid

    @property
    def sees_all(self) -> bool:
        """Whether no token is out of reach of any other, and none is pooled."""
        grid, reach = self.grid, self.config.radius**2
        farthest = (grid.height - 1) ** 2 + (grid.width - 1) ** 2
        return grid.frames == 1 and self.config.pool is None and farthest < reach

    @property
    def num_pooled(self) -> int:
        """Squares of tokens that become one further key each."""
        side = self.config.pool
        if side is None:
            return 0
        return self.grid.frames * -(-self.grid.height // side) * -(-self.grid.width // side)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """Attend, tensors `[B, H, S, D]`.

        Raises:
            UnsupportedError: If the call is causal, or has a mask beside pooled keys.
        """
        if is_causal:
            raise UnsupportedError(
                "clear: expected attention without `is_causal`, got it. Leave that site out with "
                "`sites`."
            )
        if attn_mask is not None and self.config.pool is not None:
            raise UnsupportedError(
                "clear: expected attention without a mask beside `pool`, which would add hidden "
                "keys up with others, got one. Leave `pool` out."
            )
        scale = self.scale(query.shape[3], scale)
        attn_mask = full_mask(attn_mask, key.shape[2])
        if self.sees_all:
            return DENSE(query, key, value, attn_mask=attn_mask, is_causal=False, scale=scale)
        special, tokens = split_positions(self.grid, query.device)
        joined = self._attend_grid(query, key, value, attn_mask, scale)
        if not self.grid.num_special_tokens:
            return joined
        seeing_all = DENSE(
            query.index_select(2, special),
            key,
            value,
            attn_mask=None if attn_mask is None else mask_rows(attn_mask, special),
            is_causal=False,
            scale=scale,
        )
        out = joined.new_empty(*query.shape[:3], joined.shape[3])
        return out.index_copy_(2, tokens, joined).index_copy_(2, special, seeing_all)

    def _attend_grid(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """Outputs of the grid's tokens alone, `[B, H, S_grid, D]` in raster order."""
        special, tokens = split_positions(self.grid, query.device)
        side = self.config.pool
        num_others = self.grid.num_special_tokens + self.num_pooled
        # on meta the lists keep their values, from which the tiles that are visited are counted
        place = torch.device("cpu") if query.is_meta else query.device
        circles = circle_lists(self.grid, self.config.radius, num_others, place)
        rows = tokens[circles.tokens]
        columns = torch.cat([rows, special])
        mask = attn_mask
        if mask is not None:
            mask = mask_rows(mask, rows).index_select(3, columns)

        def seen(x: Tensor) -> Tensor:
            near = x.index_select(2, columns)
            return near if side is None else torch.cat([near, self.pool(x[:, :, tokens])], 2)

        out = block_sparse_attention(
            query.index_select(2, rows),
            seen(key),
            seen(value),
            circles.lists,
            block_size=(PLACES, PLACES),
            attn_mask=mask,
            scale=scale,
        )
        return out.index_select(2, circles.places)

    def pool(self, x: Tensor) -> Tensor:
        """Keys or values of grid tokens added up in squares.

        Args:
            x: `[B, H, S_grid, D]`, in raster order.

        Returns:
            `[B, H, num_pooled, D]`, none without `pool`.
        """
        side = self.config.pool
        if side is None:
            return x[:, :, :0]
        _, height, width = self.grid.shape
        rows, columns = -(-height // side), -(-width // side)
        inside = min(side, height), min(side, width)
        short = (0, 0, 0, columns * inside[1] - width, 0, rows * inside[0] - height)
        maps = x.unflatten(2, self.grid.shape)
        maps = pad(maps, short) if any(short) else maps
        squares = maps.unflatten(4, (columns, inside[1])).unflatten(3, (rows, inside[0]))
        if self.config.pool_weights is None:
            weight = x.new_tensor(1 / side**2)
        else:
            weight = x.new_tensor(self.config.pool_weights).view(side, 1, side, 1)
            weight = weight[: inside[0], :, : inside[1]]
        pooled = (squares * weight).sum((4, 6))
        if height % side or width % side:
            held = _tokens_held(height, side)[:, None] * _tokens_held(width, side)
            pooled = pooled * (side**2 / held.double()).to(x.device, x.dtype)[:, :, None]
        return pooled.flatten(2, 4)

    def scale(self, head_dim: int, scale: float | None) -> float | None:
        """The scale of a call, for the number of its tokens where that is set."""
        if not self.config.temperature_base:
            return scale
        length = self.grid.num_tokens * (1 if self.config.pool is None else POOLED_LENGTH)
        factor = math.sqrt(math.log(length) / math.log(self.config.temperature_base))
        return factor * (head_dim**-0.5 if scale is None else scale)

    def keep_fraction(self, query: Tensor, key: Tensor) -> float:
        """A token sees the keys in its circle, those of special tokens and the pooled ones."""
        _, height, width = self.grid.shape
        down = torch.arange(-height + 1, height, device="cpu")
        right = torch.arange(-width + 1, width, device="cpu")
        near = down[:, None] ** 2 + right**2 < self.config.radius**2
        pairs = (near * (height - down.abs())[:, None] * (width - right.abs())).sum().item()
        kept = kept_pairs(self.grid, pairs / (height * width) ** 2 / self.grid.frames)
        return kept + self.grid.num_grid_tokens * self.num_pooled / self.grid.num_tokens**2


def _tokens_held(length: int, side: int) -> Tensor:
    """Tokens of each square along an axis, `[ceil(length / side)]`; the last may have fewer."""
    return (length - torch.arange(0, length, side, device="cpu")).clamp(max=side)
