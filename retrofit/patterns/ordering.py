"""The order in which tokens are cut into blocks: grid tokens first, special keys last."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes

from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.layout.token_order import TokenOrder, token_order

Borders = Literal["none", "frames", "tiles"]


class BlockOrder(NamedTuple):
    """Where the tokens of a sequence stand in block order, int64 tensors.

    Attributes:
        rows: Sequence position of each query place `[R]`; fillings repeat a token.
        columns: Sequence position of each key place `[C]`, the special keys last.
        special: Sequence positions of the special tokens.
        tokens: Sequence positions of the grid tokens, ascending.
        places: Place among the rows of each of `tokens`; None where `rows` are the tokens, each
            once.
        shown: False where a key only fills a block, bool `[C]`, or None.
        is_plain: Whether this is the order of the sequence, without special tokens.
    """

    rows: Tensor
    columns: Tensor
    special: Tensor
    tokens: Tensor
    places: Tensor | None
    shown: Tensor | None
    is_plain: bool

    def key_mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """A full mask's rows and columns in this order."""
        if attn_mask is None or self.is_plain:
            return attn_mask
        mask = attn_mask if attn_mask.shape[2] == 1 else attn_mask.index_select(2, self.rows)
        return mask.index_select(3, self.columns)

    def keys(self, x: Tensor) -> Tensor:
        """Keys or values `[B, H, S, D]` in this order."""
        return x if self.is_plain else x.index_select(2, self.columns)

    def queries(self, x: Tensor) -> Tensor:
        """Queries `[B, H, S, D]` in this order."""
        return x if self.is_plain else x.index_select(2, self.rows)

    def is_shown(self) -> Tensor | None:
        """`shown` as a mask `[1, 1, 1, C]`."""
        return None if self.shown is None else self.shown.view(1, 1, 1, -1)

    def block_of_query(self, block: int) -> Tensor:
        """Block of each query of the sequence, -1 for special tokens, int64 `[S]`."""
        places = torch.arange(self.rows.numel(), device=self.rows.device)
        if self.places is not None:
            places, rows = self.places, self.tokens
        else:
            rows = self.rows
        blocks = rows.new_full((self.tokens.numel() + self.special.numel(),), -1)
        return blocks.index_copy_(0, rows, places // block)

    def block_of_key(self, block: int) -> Tensor:
        """Block of each key of the sequence, int64 `[S]`."""
        places = torch.arange(self.columns.numel(), device=self.columns.device)
        real = places if self.shown is None else places[self.shown]
        blocks = self.columns.new_zeros(self.tokens.numel() + self.special.numel())
        return blocks.index_copy_(0, self.columns[real], real // block)


def order_blocks(
    layout: TokenGrid,
    order: TokenOrder,
    block_size: tuple[int, int],
    borders: Borders,
    *,
    share_blocks: bool,
    device: torch.device,
) -> BlockOrder:
    """The order of a layout's tokens in blocks, found once for a layout and a device.

    Args:
        layout: Of the sequence.
        order: In which grid tokens are walked; tiles hold one block of keys.
        block_size: Queries and keys per block.
        borders: At which borders a block has to end; what is missing there is filled up.
        share_blocks: Whether the first special keys fill up the last block of grid keys, instead of
            having blocks of their own.
        device: Where the result lives.
    """
    settings: tuple[Any, ...] = (layout, order, block_size, borders, share_blocks, device)
    if torch.compiler.is_compiling():
        return _order_blocks(*settings)
    return _cached_order(*settings)


@functools.lru_cache(maxsize=64)
def _cached_order(*settings: Any) -> BlockOrder:
    with _disable_current_modes(), torch.device("cpu"):  # remembered, whoever asks first
        return _order_blocks(*settings)


def _order_blocks(
    layout: TokenGrid,
    order: TokenOrder,
    block_size: tuple[int, int],
    borders: Borders,
    share_blocks: bool,
    device: torch.device,
) -> BlockOrder:
    special, tokens = split_positions(layout, device)
    block, padding = block_size[1], -layout.num_grid_tokens % block_size[1]
    is_plain = order == "raster" and borders == "none" and not layout.num_special_tokens
    rows, places, shown = tokens, None, None
    if order != "raster":
        rows = tokens[token_order(layout, order, tile_size=tile_of(block), device=device)]
    if borders != "none":
        walked = places_between(layout, borders, block_size)
        filled = (walked >= 0).nonzero()[:, 0].to(device)  # on the CPU: waits for no device
        walked = walked.to(device)
        rows = rows[walked.clamp(min=0)]
        places = filled[rows[filled].argsort()]
        shown = torch.cat([walked >= 0, torch.ones_like(special, dtype=torch.bool)])
    columns = torch.cat([rows, special])
    if borders == "none" and padding and layout.num_special_tokens and not share_blocks:
        columns = torch.cat([rows, rows[:1].expand(padding), special])
        place = torch.arange(columns.numel(), device=device) - layout.num_grid_tokens
        shown = (place < 0) | (place >= padding)
    return BlockOrder(rows, columns, special, tokens, places, shown, is_plain)


def tile_of(block: int) -> tuple[int, int, int]:
    """Frames, rows and columns of a tile that holds one block of keys."""
    side = math.isqrt(block)
    return 1, side, block // side


def places_between(layout: TokenGrid, borders: Borders, block_size: tuple[int, int]) -> Tensor:
    """Where every place of the blocks takes its token from, when blocks end at borders.

    Args:
        layout: Its special tokens do not count.
        borders: `frames`: a frame is filled up to whole blocks of queries and of keys. `tiles`:
            each of its tiles is too, to whole blocks of keys.
        block_size: Queries and keys per block.

    Returns:
        int64 on the CPU: the number of a token in the order in which they are walked, -1 for a
        filling.
    """
    inside, sizes = layout.height * layout.width, [layout.height * layout.width]
    if borders == "tiles":
        _, rows, columns = tile_of(block_size[1])
        heights = [min(rows, layout.height - y) for y in range(0, layout.height, rows)]
        widths = [min(columns, layout.width - x) for x in range(0, layout.width, columns)]
        sizes = [height * width for height in heights for width in widths]
    pieces, first = [], 0
    for size in sizes:
        piece = torch.arange(first, first + size, device="cpu")
        pieces.append(pad(piece, (0, -size % block_size[1]), value=-1))
        first += size
    frame = torch.cat(pieces)
    frame = pad(frame, (0, -frame.numel() % math.lcm(*block_size)), value=-1)
    starts = torch.arange(layout.frames, device="cpu")[:, None] * inside
    return torch.where(frame >= 0, starts + frame, -1).flatten()
