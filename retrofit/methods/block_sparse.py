"""Block-sparse attention: pooled queries and keys say which blocks are worth attending to.

Paper: https://arxiv.org/abs/2509.07120 (block-sparse global attention). Departure: every query sees
every special key; the original shows the special keys that share a block with the last grid tokens
only where that block is chosen (`upstream_selection`). `borders`, `dropped`,
`selection` and `layer_keep` are beyond the paper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import select_blocks
from retrofit.kernels.block_sparse.lists import count_blocks
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.layout.token_order import TokenOrder
from retrofit.methods.base import Method
from retrofit.methods.block_choice import Selection, choose_under_mask
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import check_keep
from retrofit.patterns import AttentionCall, Blocks, Dense, Pattern
from retrofit.patterns.blocks import Ordered
from retrofit.patterns.call import visible_keys
from retrofit.patterns.ordering import BlockOrder, Borders, order_blocks
from retrofit.runtime.errors import ConfigError


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

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
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
        return problems

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        """Takes self-attention over the whole input."""
        if site.scope == "frame":
            return "attention within a frame"
        return super().skips(site, network)

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """The blocks that pooled queries and keys of this call choose.

        Raises:
            ConfigError: If `layer_keep` has no value for this layer.
        """
        keep = self.keep
        if self.layer_keep is not None:
            if site.index >= len(self.layer_keep):
                raise ConfigError(
                    f"{site.path}: layer_keep: expected a value for layer {site.index}, got"
                    f" {len(self.layer_keep)} values. Give one for each layer."
                )
            keep = self.layer_keep[site.index]
        if self.keeps_all(layout, keep):
            return Dense(layout)
        call.refuse_causal(self.name)
        order = order_blocks(
            layout,
            self.order,
            self.block_size,
            self.borders,
            share_blocks=self.upstream_selection,
            device=call.query.device,
        )
        ordered = Ordered.of(call, order)
        block_map = self._choose(call, order, ordered, keep)
        return Blocks(
            layout=layout,
            order=order,
            block_size=self.block_size,
            block_map=block_map,
            ordered=ordered,
            max_count=self._longest_row(
                order, block_map, keep, is_masked=call.attn_mask is not None
            ),
            has_means=self.dropped == "mean",
            visible=None if call.attn_mask is None else visible_keys(call.attn_mask),
        )

    def keeps_all(self, layout: TokenGrid, keep: float | None) -> bool:
        """Whether every block is kept whatever the scores are."""
        blocks = count_blocks(layout.num_grid_tokens, self.block_size[1])
        return blocks == 1 or (keep is not None and int(blocks * keep) >= blocks)

    def _choose(
        self, call: AttentionCall, order: BlockOrder, ordered: Ordered, keep: float | None
    ) -> Tensor:
        """Blocks of grid keys by their pooled scores, and every further block of special keys."""
        num_tokens = order.rows.numel()
        choose = select_blocks
        # the mask without the places that fill a last block, which pooling leaves out by itself
        mask = ordered.mask if order.places is not None else order.key_mask(call.attn_mask)
        if mask is None and self.selection == "error":
            mask = torch.ones_like(order.rows, dtype=torch.bool).view(1, 1, 1, -1)
        if mask is not None:
            choose = functools.partial(
                choose_under_mask, mask=mask[..., :num_tokens], selection=self.selection
            )
        block_map = choose(
            ordered.query,
            ordered.key[:, :, :num_tokens],
            block_size=self.block_size,
            keep=keep,
            mass=self.mass,
            pooling=self.pooling,
            scale=call.scale,
        )
        always = count_blocks(ordered.key.shape[2], self.block_size[1]) - block_map.shape[3]
        return pad(block_map, (0, always), value=True) if always else block_map

    def _longest_row(
        self, order: BlockOrder, block_map: Tensor, keep: float | None, is_masked: bool
    ) -> int | None:
        """Most blocks of a row, where it is known without waiting for the device."""
        if self.mass is not None or keep is None:
            return None
        block_q, block_k = self.block_size
        blocks = count_blocks(order.rows.numel(), block_k)
        longest = max(1, int(blocks * keep)) + block_map.shape[3] - blocks
        if is_masked:  # a row's own blocks may come on top
            longest = longest + count_blocks(block_q, block_k) + 1
        return min(longest, block_map.shape[3])
