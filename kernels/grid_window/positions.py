"""Where the tokens of a tile stand in the sequence, and what its rows see."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from retrofit.layout.grid import TokenGrid

from .arguments import Size
from .axes import AxisTables


class Chunk(NamedTuple):
    """Rows of some tiles with the keys they visit, as positions in the sequence.

    Attributes:
        queries: `[c, R]`; padding slots repeat a query of the chunk.
        is_query: False where the slot is padding, `[c, R]`.
        keys: `[c, K]`, special tokens last.
        visible: bool `[c, R, K]`, or None where all is seen.
    """

    queries: Tensor
    is_query: Tensor
    keys: Tensor
    visible: Tensor | None


def axis_steps(grid: TokenGrid) -> Size:
    """Distance in the sequence of neighbors on each axis."""
    return grid.num_frame_prefix_tokens + grid.height * grid.width, grid.width, 1


def first_grid_position(grid: TokenGrid) -> int:
    """Position in the sequence of the grid's first token."""
    return grid.num_prefix_tokens + grid.num_frame_prefix_tokens


def special_token_positions(grid: TokenGrid, device: torch.device | str) -> Tensor:
    """Positions of the special tokens, int64 `[num_special_tokens]`."""
    per_frame = grid.num_frame_prefix_tokens + grid.height * grid.width
    end = grid.num_tokens
    first = torch.arange(grid.num_prefix_tokens, device=device)
    frames = torch.arange(grid.frames, device=device)[:, None] * per_frame
    inner = frames + torch.arange(grid.num_frame_prefix_tokens, device=device)
    last = torch.arange(end - grid.num_suffix_tokens, end, device=device)
    return torch.cat([first, (inner + grid.num_prefix_tokens).flatten(), last])


def tile_size(tables: list[AxisTables]) -> tuple[int, int, int]:
    """Tiles, query slots per tile and key slots per tile, of the product."""
    return (
        math.prod([table.num_tiles for table in tables]),
        math.prod([table.tile for table in tables]),
        math.prod([table.span for table in tables]),
    )


def build_chunk(
    grid: TokenGrid, tables: list[AxisTables], tiles: Tensor, slots: Tensor, special: Tensor
) -> Chunk:
    """Positions and mask of query slots `[R]` of tiles `[c]`, both counted frames slowest."""
    t, y, x = tables
    frame_tiles = y.num_tiles * x.num_tiles
    picks = (tiles // frame_tiles, tiles // x.num_tiles % y.num_tiles, tiles % x.num_tiles)
    rows = (slots // (y.tile * x.tile), slots // x.tile % y.tile, slots % x.tile)
    first = first_grid_position(grid)
    position = torch.zeros((), dtype=torch.int64, device=tiles.device)
    valid = torch.ones((), dtype=torch.bool, device=tiles.device)
    keys: list[Tensor] = []
    masks: list[Tensor | None] = []
    for table, pick, row, step in zip(tables, picks, rows, axis_steps(grid), strict=True):
        pick = pick[:, None]
        position = position + table.queries[pick, row] * step  # [c, R]
        valid = valid & table.is_query[pick, row]
        keys.append(table.keys[pick[:, 0]] * step)
        if table.is_masked:
            key = torch.arange(table.span, device=tiles.device)
            low, high = table.low[pick, row][..., None], table.high[pick, row][..., None]
            masks.append((key >= low) & (key < high))  # [c, R, span]
        else:
            masks.append(None)
    key_position = first + (
        keys[0][:, :, None, None] + keys[1][:, None, :, None] + keys[2][:, None, None, :]
    ).flatten(1)
    visible = _combine(masks, [table.span for table in tables])
    if grid.num_special_tokens:
        key_position = torch.cat([key_position, special.expand(tiles.shape[0], -1)], 1)
        if visible is not None:
            visible = F.pad(visible, (0, grid.num_special_tokens), value=True)
    return Chunk(position + first, valid, key_position, visible)


def _combine(masks: list[Tensor | None], spans: list[int]) -> Tensor | None:
    """Product of masks `[c, R, span]` over the axes, `[c, R, spans multiplied]`."""
    result: Tensor | None = None
    for i, mask in enumerate(masks):
        if mask is None:
            continue
        shape = [1, 1, 1]
        shape[i] = spans[i]
        mask = mask.reshape(*mask.shape[:2], *shape)
        result = mask if result is None else result & mask
    return None if result is None else result.expand(-1, -1, *spans).flatten(2)
