"""Attention over lists of key blocks, and the pattern of blocks that a method chose for a call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import (
    BlockLists,
    block_sparse_attention,
    lists_from_mask,
    masked_attention,
)
from retrofit.kernels.block_sparse.lists import count_blocks
from retrofit.layout.grid import TokenGrid
from retrofit.patterns.base import Attended, Pattern
from retrofit.patterns.call import AttentionCall, join_masks
from retrofit.patterns.means import add_dropped_means, keys_in_means
from retrofit.patterns.ordering import BlockOrder
from retrofit.runtime.devices import widest_float

Size = tuple[int, int]


class Ordered(NamedTuple):
    """Queries and keys of a call in block order, and its mask.

    Attributes:
        query: `[B, H, R, D]`.
        key: `[B, H_kv, C, D]`.
        mask: Of the call and of places that only fill blocks, or None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, call: AttentionCall, order: BlockOrder) -> Ordered:
        """Reorder a call whose mask has four axes."""
        mask = join_masks(order.key_mask(call.attn_mask), order.is_shown())
        return cls(order.queries(call.query), order.keys(call.key), mask)


def attend_blocks(  # noqa: PLR0913 - an attention call
    call: AttentionCall,
    order: BlockOrder,
    ordered: Ordered,
    value: Tensor,
    blocks: Tensor | BlockLists,
    *,
    block_size: Size,
    backend: str | None,
    with_lse: bool,
    finish: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Attended:
    """Grid queries over lists of blocks, special queries over everything.

    Args:
        call: Whole, in the order of the sequence.
        order: Of its tokens in blocks.
        ordered: Its queries and keys in that order.
        value: Its values in that order.
        blocks: Of keys for each block of queries.
        block_size: Query and key tokens of a block.
        backend: Of `block_sparse_attention`.
        with_lse: Also return the log-sum-exp.
        finish: Changes output and log-sum-exp of the places before they are put back.
    """
    settings = {"block_size": block_size, "attn_mask": ordered.mask, "scale": call.scale}
    tensors = ordered.query, ordered.key, value, blocks
    lse = None
    if with_lse or finish is not None:
        out, lse = block_sparse_attention(*tensors, **settings, backend=backend, return_lse=True)  # type: ignore[call-overload]
        out, lse = (out, lse) if finish is None else finish(out, lse)
    else:
        out = block_sparse_attention(*tensors, **settings, backend=backend)  # type: ignore[call-overload]
    if order.is_plain:
        return Attended(out, lse)
    special = Attended(out[:, :, :0], None if lse is None else lse[:, :, :0])
    if order.special.numel():
        special = _attend_everything(call.queries(order.special), with_lse)
    joined = _put_back(out, special.out, order)
    if lse is None or special.lse is None or not with_lse:
        return Attended(joined)
    return Attended(joined, _put_back(lse, special.lse.to(lse.dtype), order))


def _attend_everything(call: AttentionCall, with_lse: bool) -> Attended:
    if not with_lse:
        return Attended(call.attend_densely())
    tensors = call.query, call.key, call.value
    return Attended(*masked_attention(*tensors, None, attn_mask=call.attn_mask, scale=call.scale))


def _put_back(of_places: Tensor, of_special: Tensor, order: BlockOrder) -> Tensor:
    """Results of places and of special tokens in the order of the sequence, along axis 2."""
    if order.is_plain:
        return of_places
    tokens = order.rows
    if order.places is not None:
        of_places, tokens = of_places.index_select(2, order.places), order.tokens
        if not of_special.shape[2]:
            return of_places
    length = tokens.numel() + of_special.shape[2]
    joined = of_places.new_empty(*of_places.shape[:2], length, *of_places.shape[3:])
    joined = joined.index_copy_(2, tokens, of_places)
    return joined.index_copy_(2, order.special, of_special) if of_special.shape[2] else joined


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks(Pattern):
    """Blocks of keys chosen for each block of queries of one call.

    Attributes:
        layout: Of the tokens.
        order: In which they are cut into blocks.
        block_size: Query and key tokens of a block.
        block_map: Blocks kept, bool `[B, H, n_q, n_k]`, those of special keys last.
        ordered: The call's queries and keys, which the choice has looked at.
        max_count: Most blocks of a row, where that is known without waiting for the device.
        has_means: Whether a block that is not kept is seen as its mean.
        visible: Keys that the call's mask shows, bool `[B, S]`; None for all.
    """

    layout: TokenGrid
    order: BlockOrder
    block_size: Size
    block_map: Tensor
    ordered: Ordered
    max_count: int | None = None
    has_means: bool = False
    visible: Tensor | None = None
    name: ClassVar[str] = "block-sparse"

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key's block is kept for the query's block; special tokens see all."""
        of_query = self.order.block_of_query(self.block_size[0])[query]
        of_key = self.order.block_of_key(self.block_size[1])[key]
        return self.block_map[batch, head, of_query.clamp(min=0), of_key] | (of_query < 0)

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """As lists where the longest row is known, else as a mask of blocks."""
        blocks: Tensor | BlockLists = self.block_map
        if self.max_count is not None:
            blocks = lists_from_mask(self.block_map, max_count=self.max_count)
        value = self.order.keys(call.value)
        finish = functools.partial(self._add_means, call, value) if self.has_means else None
        return attend_blocks(
            call,
            self.order,
            self.ordered,
            value,
            blocks,
            block_size=self.block_size,
            backend=backend,
            with_lse=with_lse,
            finish=finish,
        )

    def define(self, call: AttentionCall) -> Attended:
        """Dense attention under the mask, then the means of what it hides."""
        if not self.has_means:
            return super().define(call)
        order, value = self.order, self.order.keys(call.value)
        kept = Attended(*super().define(call))
        assert kept.lse is not None  # noqa: S101 - the definition gives it
        rows = Attended(kept.out[:, :, order.rows], kept.lse[:, :, order.rows])
        out, lse = self._add_means(call, value, *rows)  # type: ignore[arg-type]
        special = order.special
        return Attended(
            _put_back(out, kept.out[:, :, special], order),
            _put_back(lse, kept.lse[:, :, special].to(lse.dtype), order),
        )

    def _add_means(
        self, call: AttentionCall, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the places, blocks that are not kept seen as their means."""
        count = self.order.rows.numel()
        shown = keys_in_means(self.ordered.mask, self.order.columns)
        return add_dropped_means(
            out,
            lse,
            self.ordered.query,
            self.ordered.key[:, :, :count],
            value[:, :, :count],
            kept=self.block_map[..., : count_blocks(count, self.block_size[1])],
            shown=shown[:, :count],
            block_size=self.block_size,
            scale=call.factor,
        )

    def keep(self) -> float:
        """Fraction of the pairs of visible tokens that is computed.

        A block that is seen as its mean counts as one key. NaN on meta, where nothing is chosen.
        """
        if self.block_map.is_meta:
            return math.nan
        layout, order = self.layout, self.order
        visible = self.visible
        if visible is None:
            visible = torch.ones(1, layout.num_tokens, dtype=torch.bool, device=order.rows.device)
        shown, rows = visible[:, order.columns], visible[:, order.rows]
        if order.shown is not None:
            shown = shown & order.shown
        if order.places is not None:
            rows = rows & shown[:, : rows.shape[1]]
        of_q, of_k = (
            _sums(x, block) for x, block in zip((rows, shown), self.block_size, strict=True)
        )
        seen = self.block_map * of_k[:, None, None]
        if self.has_means:
            seen = torch.where(self.block_map, seen, (of_k > 0)[:, None, None].to(seen.dtype))
        total = visible.sum(1).to(of_q.dtype)
        pairs = (seen * of_q[:, None, :, None]).sum((2, 3)).mean(1)
        pairs = pairs + layout.num_special_tokens * total
        return (pairs.sum() / (total**2).expand_as(pairs).sum()).item()

    def pairs(self) -> float:
        """As many as the fraction of visible ones is of all."""
        return self.keep() * self.layout.num_tokens**2


def _sums(x: Tensor, block: int) -> Tensor:
    """Sums per block, `[B, S]` to the widest float of the device `[B, ceil(S / block)]`."""
    return (
        pad(x.to(widest_float(x.device)), (0, -x.shape[1] % block)).unflatten(1, (-1, block)).sum(2)
    )
