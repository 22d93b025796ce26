"""One attention call's tensors in the order in which they are cut into blocks."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.layout.token_order import TokenOrder, token_order

Borders = Literal["none", "frames", "tiles"]


class Arranged(NamedTuple):
    """Queries and keys in block order: grid tokens first, special keys last.

    Attributes:
        query: `[B, H, S_grid, D]`.
        key: `[B, H_kv, n, D]`.
        mask: The call's mask in this order, or None.
        shown: False where a key only fills a block, bool `[1, 1, 1, n]`, or None.
        real: The queries that are no filling, int64 `[S_grid]`, or None for all.
        special: Sequence positions of the special tokens.
        tokens: Sequence positions of the queries; fillings repeat one.
        columns: Sequence positions of the keys.
        is_plain: Whether this is the order of the sequence.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    shown: Tensor | None
    real: Tensor | None
    special: Tensor
    tokens: Tensor
    columns: Tensor
    is_plain: bool

    @property
    def num_grid_keys(self) -> int:
        """Keys before those of special tokens, fillings inside included."""
        return self.tokens.numel()


def arrange(  # noqa: PLR0913 - a call's tensors and every setting of its layout
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    *,
    grid: TokenGrid,
    order: TokenOrder,
    block_size: tuple[int, int],
    borders: Borders,
    share_blocks: bool,
) -> Arranged:
    """Bring one call's tensors into block order.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`.
        attn_mask: As from `full_mask`, or None.
        grid: Layout of the sequence.
        order: In which grid tokens are walked; tiles hold one block of keys.
        block_size: Queries and keys per block.
        borders: At which borders a block has to end; what is missing there is filled up.
        share_blocks: Whether the first special keys fill up the last block of grid keys, instead of
            having blocks of their own.
    """
    special, tokens = split_positions(grid, query.device)
    block = block_size[1]
    if order == "raster" and borders == "none" and not grid.num_special_tokens:
        return Arranged(query, key, attn_mask, None, None, special, tokens, tokens, is_plain=True)
    if order != "raster":
        order_of = token_order(grid, order, tile_size=tile_shape(block), device=query.device)
        tokens = tokens[order_of]
    real = None
    if borders != "none":
        places = places_between(grid, borders, block_size)
        real = (places >= 0).nonzero()[:, 0].to(query.device)  # found without waiting for a device
        places = places.to(query.device)
        tokens = tokens[places.clamp(min=0)]
    columns, shown = torch.cat([tokens, special]), None
    padding = -grid.num_grid_tokens % block
    if real is not None:
        place = torch.cat([places >= 0, torch.ones_like(special, dtype=torch.bool)])
        shown = place.view(1, 1, 1, -1)
    elif padding and grid.num_special_tokens and not share_blocks:
        columns = torch.cat([tokens, tokens[:1].expand(padding), special])
        place = torch.arange(columns.numel(), device=columns.device) - grid.num_grid_tokens
        shown = ((place < 0) | (place >= padding)).view(1, 1, 1, -1)
    mask = None
    if attn_mask is not None:
        mask = mask_rows(attn_mask, tokens).index_select(3, columns)
    query, key = query.index_select(2, tokens), key.index_select(2, columns)
    return Arranged(query, key, mask, shown, real, special, tokens, columns, is_plain=False)


def tile_shape(block: int) -> tuple[int, int, int]:
    """Frames, rows and columns of a tile that holds one block of keys."""
    side = math.isqrt(block)
    return 1, side, block // side


def places_between(grid: TokenGrid, borders: Borders, block_size: tuple[int, int]) -> Tensor:
    """Where every place of the blocks takes its token from, when blocks end at borders.

    Args:
        grid: Its special tokens do not count.
        borders: `frames`: a frame is filled up to whole blocks of queries and of keys. `tiles`:
            each of its tiles is too, to whole blocks of keys.
        block_size: Queries and keys per block.

    Returns:
        int64 on the CPU: the number of a token in the order in which they are walked, -1 for a
        filling.
    """
    inside, sizes = grid.height * grid.width, [grid.height * grid.width]
    if borders == "tiles":
        _, rows, columns = tile_shape(block_size[1])
        heights = [min(rows, grid.height - y) for y in range(0, grid.height, rows)]
        widths = [min(columns, grid.width - x) for x in range(0, grid.width, columns)]
        sizes = [height * width for height in heights for width in widths]
    pieces, first = [], 0
    for size in sizes:
        piece = torch.arange(first, first + size, device="cpu")
        pieces.append(pad(piece, (0, -size % block_size[1]), value=-1))
        first += size
    frame = torch.cat(pieces)
    frame = pad(frame, (0, -frame.numel() % math.lcm(*block_size)), value=-1)
    starts = torch.arange(grid.frames, device="cpu")[:, None] * inside
    return torch.where(frame >= 0, starts + frame, -1).flatten()


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
