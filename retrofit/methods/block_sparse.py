"""Block-sparse attention: pooled queries and keys say which blocks are worth attending to.

Paper: https://arxiv.org/abs/2509.07120 (block-sparse global attention). Departure: every query sees
every special key; the original shows the special keys that share a block with the last grid tokens
only where that block is chosen (`upstream_selection`). `borders`, `dropped`,
`selection` and `layer_keep` are beyond the paper.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import block_sparse_attention, lists_from_mask, select_blocks
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.layout.token_order import TokenOrder
from retrofit.methods.base import DENSE, Method, Operator
from retrofit.methods.block_choice import Selection, choose_under_mask, visible_keys
from retrofit.methods.block_layout import (
    Arranged,
    Borders,
    arrange,
    full_mask,
    join_masks,
    mask_rows,
)
from retrofit.methods.block_means import add_dropped_means, keys_in_means
from retrofit.methods.block_pairs import count_blocks, count_pairs
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import check_keep
from retrofit.runtime.errors import ConfigError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class BlockSparseConfig(Method):
    """Settings of block-sparse attention.

    Attributes:
        keep: Fraction of the key blocks that each query block attends to, rounded down, at least
            one block. None leaves the choice to `mass`.
        mass: Softmax mass over the pooled scores that the chosen blocks add up to (at most). With
            `keep` given too, the larger of both choices.
        block_size: Query and key tokens of a block. Fewer tokens than a few blocks stay dense:
            take smaller blocks for short texts.
        pooling: How the tokens of a block become one: their mean, or their maximum per channel.
        order: The order in which tokens are cut into blocks: `raster`, along a `hilbert` curve in
            each frame, or in square `tiles` of a key block each.
        borders: Where blocks end early: `frames`, at the end of each frame; `tiles` (with
            order="tiles"), at the end of each tile. `none` lets a block run on into the next.
        dropped: What a query sees of the blocks that it does not attend to: `nothing`, or their
            `mean`, which costs one key more a block.
        selection: Which blocks are attended to: those of the most softmax `mass`, or (with
            dropped="mean") those whose mean stands for them worst, `error`.
        layer_keep: `keep` for each layer in turn, instead of one for all; 1.0 leaves one dense.
        upstream_selection: Cut blocks over grid and special keys together, as the original does.
    """

    name: ClassVar[str] = "block-sparse"
    summary: ClassVar[str] = "each block of queries attends to the blocks of keys that matter to it"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.07120"
    helps: ClassVar[str] = "from a few thousand tokens, below which there are few blocks to choose"
    acts_with: ClassVar[str] = "a smaller keep or block_size"

    keep: float | None = 0.5
    mass: float | None = None
    block_size: tuple[int, int] = (128, 64)
    pooling: Literal["avg", "max"] = "avg"
    order: TokenOrder = "raster"
    borders: Borders = "none"
    dropped: Literal["nothing", "mean"] = "nothing"
    selection: Selection = "mass"
    layer_keep: tuple[float, ...] | None = None
    upstream_selection: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: With every mistake at once.
        """
        problems = check_keep(self.keep)
        if self.mass is not None and not 0 <= self.mass <= 1:
            problems.append(f"mass: expected 0 <= mass <= 1, got {self.mass}.")
        if self.keep is None and self.mass is None:
            problems.append("keep, mass: expected at least one of them, got neither.")
        if min(self.block_size) < 1:
            problems.append(f"block_size: expected 1 or more, got {self.block_size}.")
        if self.borders == "tiles" and self.order != "tiles":
            problems.append(f"borders: tiles needs order tiles, got order {self.order}.")
        if self.selection == "error" and self.dropped != "mean":
            problems.append(f"selection: error needs dropped mean, got {self.dropped}.")
        if self.upstream_selection and self.borders != "none":
            problems.append(f"upstream_selection: needs borders none, got {self.borders}.")
        for keep in self.layer_keep or ():
            problems += [f"layer_{problem}" for problem in check_keep(keep)]
        if problems:
            raise ConfigError(" ".join(problems))

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        """Takes self-attention over the whole input."""
        if site.scope == "frame":
            return "attention within a frame"
        return super().skips(site, network)

    def build(self, site: AttentionSite, grid: TokenGrid, state: RunState) -> Operator:
        """Blocks of this grid's tokens.

        Raises:
            ConfigError: If `layer_keep` has no value for this layer.
        """
        config = self
        if self.layer_keep is not None:
            if site.index >= len(self.layer_keep):
                raise ConfigError(
                    f"{site.path}: layer_keep: expected a value for layer {site.index}, got"
                    f" {len(self.layer_keep)} values. Give one for each layer."
                )
            config = replace(self, keep=self.layer_keep[site.index], layer_keep=None)
        return DENSE if config.keeps_all(grid) else BlockSparse(config=config, grid=grid)

    def keeps_all(self, grid: TokenGrid) -> bool:
        """Whether every block is kept whatever the scores are."""
        blocks = count_blocks(grid.num_grid_tokens, self.block_size[1])
        return blocks == 1 or (self.keep is not None and int(blocks * self.keep) >= blocks)


@dataclass(kw_only=True)
class BlockSparse:
    """The operator for one grid.

    Attributes:
        config: The method's settings.
        grid: Layout of the tokens.
        block_map: Blocks of the latest eager call, bool `[B, H, n_q, n_k]`, the blocks of special
            keys last; None before the first call and where it was dense.
        real: Keys that the mask of that call showed, bool `[B, S]`, or None for all.
    """

    config: BlockSparseConfig
    grid: TokenGrid
    block_map: Tensor | None = field(default=None, init=False)
    real: Tensor | None = field(default=None, init=False)

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
            UnsupportedError: If the call is causal.
        """
        if is_causal:
            raise UnsupportedError(
                "block-sparse: expected attention without `is_causal`, got it. Leave that site "
                "out with `sites`."
            )
        attn_mask = full_mask(attn_mask, key.shape[2])
        parts = self.arrange(query, key, attn_mask)
        block_map = self._choose(parts, scale)
        if not torch.compiler.is_compiling():
            self.block_map = block_map
            self.real = None if attn_mask is None else visible_keys(attn_mask)
        values = value if parts.is_plain else value.index_select(2, parts.columns)
        out = self._attend_blocks(parts, values, block_map, scale)
        if parts.is_plain:
            return out
        special, tokens, real = parts.special, parts.tokens, parts.real
        del parts, values  # as large as the call's own tensors
        if real is not None:
            out, tokens = out.index_select(2, real), tokens.index_select(0, real)
        mask = None if attn_mask is None else mask_rows(attn_mask, special)
        seeing_all = DENSE(
            query.index_select(2, special),
            key,
            value,
            attn_mask=mask,
            is_causal=False,
            scale=scale,
        )
        joined = out.new_empty(*query.shape[:3], out.shape[3])
        return joined.index_copy_(2, tokens, out).index_copy_(2, special, seeing_all)

    def _attend_blocks(
        self, parts: Arranged, values: Tensor, block_map: Tensor, scale: float | None
    ) -> Tensor:
        """Grid queries over the chosen blocks, and over the means of the others if so set."""
        tensors = parts.query, parts.key, values, self._as_lists(block_map, parts)
        masks = join_masks(parts.mask, parts.shown)
        size = self.config.block_size
        if self.config.dropped == "nothing":
            return block_sparse_attention(*tensors, block_size=size, attn_mask=masks, scale=scale)
        shown = keys_in_means(masks, parts.columns)
        out, lse = block_sparse_attention(
            *tensors, block_size=size, attn_mask=masks, scale=scale, return_lse=True
        )
        count = parts.num_grid_keys
        return add_dropped_means(
            out,
            lse,
            parts.query,
            parts.key[:, :, :count],
            values[:, :, :count],
            kept=block_map[..., : count_blocks(count, size[1])],
            shown=shown[:, :count],
            block_size=size,
            scale=parts.query.shape[-1] ** -0.5 if scale is None else scale,
        )

    def keep_fraction(self, query: Tensor, key: Tensor) -> float:
        """Fraction of the pairs of visible tokens that the latest call computed.

        A dropped block that is seen as its mean counts as one key. NaN on meta, where nothing is
        chosen.
        """
        if query.is_meta:
            return math.nan
        parts = self.arrange(query, key, None)
        block_map = self.choose_blocks(query, key) if self.block_map is None else self.block_map
        real = self.real
        if real is None:
            real = torch.ones(1, self.grid.num_tokens, dtype=torch.bool, device=query.device)
        shown = real[:, parts.columns]
        if parts.shown is not None:
            shown = shown & parts.shown.view(1, -1)
        rows = real[:, parts.tokens]
        if parts.real is not None:
            rows = rows & shown[:, : parts.num_grid_keys]
        size, has_means = self.config.block_size, self.config.dropped == "mean"
        pairs = count_pairs(block_map, rows, shown, block_size=size, has_means=has_means)
        total = real.sum(1).to(pairs.dtype)
        pairs = pairs + self.grid.num_special_tokens * total
        return (pairs.sum() / (total**2).expand_as(pairs).sum()).item()

    def choose_blocks(self, query: Tensor, key: Tensor) -> Tensor:
        """The blocks that a call without a mask attends to, as in `block_map`."""
        return self._choose(self.arrange(query, key, None), None)

    def arrange(self, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Arranged:
        """A call's tokens in the order in which they are cut into blocks."""
        return arrange(
            query,
            key,
            attn_mask,
            grid=self.grid,
            order=self.config.order,
            block_size=self.config.block_size,
            borders=self.config.borders,
            share_blocks=self.config.upstream_selection,
        )

    def _choose(self, parts: Arranged, scale: float | None) -> Tensor:
        """Blocks of grid keys by their pooled scores, and every further block of special keys."""
        num_tokens = parts.num_grid_keys
        choose = select_blocks
        mask = parts.mask if parts.real is None else join_masks(parts.mask, parts.shown)
        if mask is None and self.config.selection == "error":
            mask = torch.ones_like(parts.tokens, dtype=torch.bool).view(1, 1, 1, -1)
        if mask is not None:
            choose = functools.partial(
                choose_under_mask,
                mask=mask[..., :num_tokens],
                selection=self.config.selection,
            )
        block_map = choose(
            parts.query,
            parts.key[:, :, :num_tokens],
            block_size=self.config.block_size,
            keep=self.config.keep,
            mass=self.config.mass,
            pooling=self.config.pooling,
            scale=scale,
        )
        always = count_blocks(parts.key.shape[2], self.config.block_size[1]) - block_map.shape[3]
        return pad(block_map, (0, always), value=True) if always else block_map

    def _as_lists(self, block_map: Tensor, parts: Arranged) -> Any:
        """The same as lists where the longest row is known without waiting for the device."""
        block_q, block_k = self.config.block_size
        blocks = count_blocks(parts.num_grid_keys, block_k)
        if self.config.mass is not None or self.config.keep is None:
            return block_map
        longest = max(1, int(blocks * self.config.keep)) + block_map.shape[3] - blocks
        if parts.mask is not None:  # a row's own blocks may come on top
            longest = longest + count_blocks(block_q, block_k) + 1
        return lists_from_mask(block_map, max_count=min(longest, block_map.shape[3]))
