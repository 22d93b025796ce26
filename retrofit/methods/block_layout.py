"""One attention call's tensors in the order in which they are cut into blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.grid import TokenGrid, split_positions
from retrofit.token_order import TokenOrder, token_order


class Arranged(NamedTuple):
    """Queries and keys in block order: grid tokens first, special keys last.

    Attributes:
        query: `[B, H, S_grid, D]`.
        key: `[B, H_kv, n, D]`.
        mask: The call's mask in this order, or None.
        shown: False where a key only fills a block, bool `[1, 1, 1, n]`, or None.
        special: Sequence positions of the special tokens.
        tokens: Sequence positions of the grid tokens.
        columns: Sequence positions of the keys.
        is_plain: Whether this is the order of the sequence.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    shown: Tensor | None
    special: Tensor
    tokens: Tensor
    columns: Tensor
    is_plain: bool


def arrange(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    *,
    grid: TokenGrid,
    order: TokenOrder,
    block: int,
    share_blocks: bool,
) -> Arranged:
    """Bring one call's tensors into block order.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`.
        attn_mask: As from `full_mask`, or None.
        grid: Layout of the sequence.
        order: In which grid tokens are walked; tiles hold one block of keys.
        block: Keys per block.
        share_blocks: Whether the first special keys fill up the last block of grid keys, instead of
            having blocks of their own.
    """
    special, tokens = split_positions(grid, query.device)
    if order == "raster" and not grid.num_special_tokens:
        return Arranged(query, key, attn_mask, None, special, tokens, tokens, is_plain=True)
    if order != "raster":
        side = math.isqrt(block)
        tile = (1, side, block // side)
        tokens = tokens[token_order(grid, order, tile_size=tile, device=query.device)]
    columns, shown = torch.cat([tokens, special]), None
    padding = -grid.num_grid_tokens % block
    if padding and grid.num_special_tokens and not share_blocks:
        columns = torch.cat([tokens, tokens[:1].expand(padding), special])
        place = torch.arange(columns.numel(), device=columns.device) - grid.num_grid_tokens
        shown = ((place < 0) | (place >= padding)).view(1, 1, 1, -1)
    mask = None
    if attn_mask is not None:
        mask = mask_rows(attn_mask, tokens).index_select(3, columns)
    query, key = query.index_select(2, tokens), key.index_select(2, columns)
    return Arranged(query, key, mask, shown, special, tokens, columns, is_plain=False)


def full_mask(attn_mask: Tensor | None, num_keys: int) -> Tensor | None:
    """A mask that broadcasts to `[B, H, S, S]` with its four axes, the last one whole."""
    if attn_mask is None:
        return None
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    return attn_mask.view(shape).expand(-1, -1, -1, num_keys)


def mask_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a mask with four axes; the only one where all are alike."""
    return mask if mask.shape[2] == 1 else mask.index_select(2, rows)


def join_masks(mask: Tensor | None, shown: Tensor | None) -> Tensor | None:
    """Both masks in one, the second one bool."""
    if mask is None or shown is None:
        return shown if mask is None else mask
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, -math.inf)
