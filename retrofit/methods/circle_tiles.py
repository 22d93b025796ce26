"""Circles around the tokens of a grid as lists of key tiles, few of which a circle cuts through.

Tokens are walked in tiles, so that the keys near a tile of queries are few tiles too. What a tile
of queries sees of a tile of keys depends on their distance alone: a small table of masks says it.
All of it is arithmetic on ranges, cheap enough for every call and traced as it stands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.kernels import BlockLists, pack_mask_bits
from retrofit.layout.grid import TokenGrid

Pair = tuple[int, int]
PLACES = 64  # of a tile


class CircleLists(NamedTuple):
    """What one call walks.

    Attributes:
        tokens: Raster index of the token in every place of the tiles; places outside the grid
            repeat one that is inside. int64.
        places: Place of every grid token, in raster order, int64.
        lists: Key tiles of every tile of queries, then every block of further keys.
    """

    tokens: Tensor
    places: Tensor
    lists: BlockLists


def tile_shape(grid: TokenGrid) -> Pair:
    """Rows and columns of a tile of 64 places, as square as the grid allows."""
    rows = 8
    while rows > 1 and rows // 2 >= grid.height:
        rows //= 2
    while rows < PLACES and PLACES // rows // 2 >= grid.width:
        rows *= 2
    return rows, PLACES // rows


def circle_lists(
    grid: TokenGrid, radius: float, num_others: int, device: torch.device
) -> CircleLists:
    """Tiles within a radius, in each frame for itself.

    Args:
        grid: Its special tokens do not count.
        radius: Distance in tokens at which a key is no longer seen.
        num_others: Keys behind those of the tiles, all of which every query sees.
        device: Where the result lives.
    """
    # the length of a range is a plain number in traced code too, as the number of tiles must be
    frames, *size = (len(range(n)) for n in grid.shape)
    tile = tile_shape(grid)
    axes = [_Axis(n, side, radius, device) for n, side in zip(size, tile, strict=True)]
    tokens, places = _walk(axes, frames)
    lists = _lists(axes, frames, radius, -(-num_others // PLACES))
    return CircleLists(tokens, places, lists)


class _Axis:
    """Rows or columns of the grid.

    Attributes:
        length: Tokens.
        side: Of a tile.
        count: Tiles; the last one may reach beyond the grid.
        number: 0 to `count`, int64.
        away: How many tiles the keys of a list entry may be away, int64 `[n]`.
        distance: Of a query and a key of tiles so far apart, int64 `[n, side, side]`.
        gap: The least distance of two tokens of such tiles, a number for each of `away`.
        inside: Whether a place is in the grid, in a whole tile and in the last one, bool
            `[1 or 2, side]`.
    """

    def __init__(self, length: int, side: int, radius: float, device: torch.device) -> None:
        self.length, self.side = length, side
        self.count = -(-length // side)
        reach = min(self.count - 1, (math.ceil(radius) + side - 2) // side)
        self.number = torch.arange(self.count, device=device)
        self.away = torch.arange(-reach, reach + 1, device=device)
        self.gap = [max(0, abs(n) * side - side + 1) for n in range(-reach, reach + 1)]
        place = torch.arange(side, device=device)
        self.distance = self.away[:, None, None] * side + place - place[:, None]
        rest = length - (self.count - 1) * side
        sizes = torch.tensor([side] if rest == side else [side, rest], device=device)
        self.inside = place < sizes[:, None]

    def is_cut(self, tile: Tensor) -> Tensor:
        """Row of `inside` for each tile."""
        return (tile == self.count - 1) * (len(self.inside) - 1)


def _walk(axes: list[_Axis], frames: int) -> tuple[Tensor, Tensor]:
    """Raster index in every place of the tiles, and place of every raster index."""
    down, right = axes
    y, x = (
        (axis.number[:, None] * axis.side + torch.arange(axis.side, device=axis.number.device))
        for axis in axes
    )
    y, x = y.clamp(max=down.length - 1), x.clamp(max=right.length - 1)
    raster = (y[:, None, :, None] * right.length + x[None, :, None]).flatten()
    frame = torch.arange(frames, device=raster.device)[:, None]
    row, column = (torch.arange(axis.length, device=raster.device) for axis in axes)
    row, column = row[:, None], column[None]
    tile = row // down.side * right.count + column // right.side
    place = tile * PLACES + row % down.side * right.side + column % right.side
    tokens = frame * (down.length * right.length) + raster
    return tokens.flatten(), (frame * raster.shape[0] + place.flatten()).flatten()


def _lists(axes: list[_Axis], frames: int, radius: float, num_others: int) -> BlockLists:
    """Tiles that a circle reaches from each tile, whole blocks of further keys behind them."""
    down, right = axes
    y = down.number[:, None, None, None] + down.away[:, None]  # [rows, 1, n, 1]
    x = right.number[:, None, None] + right.away  # [columns, 1, m]
    near = [[a * a + b * b < radius**2 for b in right.gap] for a in down.gap]
    width = min(sum(map(sum, near)), down.count * right.count)
    seen = torch.tensor(near, device=y.device)
    seen = seen & (y >= 0) & (y < down.count) & (x >= 0) & (x < right.count)
    tile = y * right.count + x
    masks = _masks(axes, radius)  # [n, m, cuts, cuts, queries, keys]
    is_whole = masks.flatten(4).all(4).flatten()
    cuts = down.is_cut(y) * len(right.inside) + right.is_cut(x)
    number = torch.arange(seen[0, 0].numel(), device=y.device).view(seen.shape[2:])
    ids = number * (masks.shape[2] * masks.shape[3]) + cuts
    ids = torch.where(is_whole[ids], -1, ids)
    # tiles that are seen come first: a row's entries from its count on are ignored
    seen, tile, ids = (part.flatten(2).flatten(0, 1) for part in (seen, tile, ids))
    order = (~seen).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    counts = seen.sum(1)
    tile, ids = (part.gather(1, order) for part in (tile.clamp(min=0), ids))
    # further blocks go behind the entries that count
    inside, room = down.count * right.count, (0, num_others)
    tile, ids = (torch.nn.functional.pad(part, room) for part in (tile, ids))
    other = torch.arange(num_others, device=y.device)
    at = counts[:, None] + other
    frame = torch.arange(frames, device=y.device)[:, None, None]
    tile = (tile.clamp(max=inside - 1) + frame * inside).flatten(0, 1)
    at, ids = at.repeat(frames, 1), ids.repeat(frames, 1)
    tile = tile.scatter(1, at, (frames * inside + other).expand_as(at))
    ids = ids.scatter(1, at, torch.full_like(at, -1))
    counts = counts.repeat(frames) + num_others
    tile, counts, ids = (part.int()[None, None] for part in (tile, counts, ids))
    return BlockLists(tile, counts, ids, pack_mask_bits(masks.flatten(0, 3)))


def _masks(axes: list[_Axis], radius: float) -> Tensor:
    """What every query of a tile sees of every key of another one.

    Returns:
        bool `[n, m, cut rows, cut columns, queries, keys]`, `n` and `m` being how far the key tile
        is away, and the cuts whether it is whole or reaches beyond the grid.
    """
    down, right = axes
    squares = down.distance[:, None, :, None, :, None] ** 2 + (
        right.distance[:, None, :, None] ** 2
    )
    near = (squares < radius**2).flatten(4, 5).flatten(2, 3)  # [n, m, queries, keys]
    inside = down.inside[:, None, :, None] & right.inside[:, None]
    return near[:, :, None, None] & inside.flatten(2)[:, :, None]
