"""Which tile of queries shares its keys: few visited pairs, against what a key costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from .arguments import Size
from .axes import NeighborhoodAxis

MULTIPLES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)


class TileCost(NamedTuple):
    """What a route pays for a tile, in the time of one query-key pair.

    Attributes:
        per_key: For bringing one key of a tile near, whatever the number of rows.
        per_row: For one row of a tile, whatever the number of keys.
        max_rows: Largest tile.
        blocks: Numbers of rows that are computed together; a tile is filled up with the last of
            them, and its rest with the smallest that holds it.
    """

    per_key: int
    per_row: int
    max_rows: int
    blocks: tuple[int, ...] = (1,)


GATHER_COST = TileCost(per_key=32, per_row=32, max_rows=512)
# a program on a GPU takes 128 rows; a larger tile only fills the last of its programs better
BLOCK_COST = TileCost(per_key=8, per_row=32, max_rows=1024, blocks=(128,))
# up to 64 rows lie in the lanes of four vectors; a key that one of them sees is paid by all
NATIVE_COST = TileCost(per_key=20, per_row=10, max_rows=64, blocks=(16, 32, 64))


def order_axes(is_whole: Sequence[bool]) -> Size:
    """Axis numbers, slowest first; axes that hide nothing come last and make long runs of keys."""
    order = sorted(range(3), key=lambda i: is_whole[i])
    return order[0], order[1], order[2]


def axis_tiles(axis: NeighborhoodAxis) -> list[int]:
    """Tile lengths worth trying on one axis: multiples and divisors of its stride."""
    stride, longest = axis.stride, axis.longest
    if axis.is_whole:
        return [-(-longest // stride) * stride]
    sizes = {n for n in range(1, stride + 1) if stride % n == 0}
    sizes |= {n * stride for n in MULTIPLES}
    return sorted(n for n in sizes if n < longest + stride)


def estimate_time(axes: Sequence[NeighborhoodAxis], tile: Sequence[int], cost: TileCost) -> float:
    """Time of all tiles, in query-key pairs."""
    tiles = math.prod([axis.num_tiles(n) for axis, n in zip(axes, tile, strict=True)])
    whole, rest = divmod(math.prod(tile), cost.blocks[-1])
    rows = whole * cost.blocks[-1] + next(n for n in (0, *cost.blocks) if n >= rest)
    keys = math.prod([axis.span(n) for axis, n in zip(axes, tile, strict=True)])
    return tiles * (rows * (keys + cost.per_row) + cost.per_key * keys)


def search_tile(axes: Sequence[NeighborhoodAxis], cost: TileCost) -> Size:
    """Tile of least estimated time among all of at most `max_rows` rows."""
    smallest, *others = itertools.product(*[axis_tiles(axis) for axis in axes])
    best, least = smallest, estimate_time(axes, smallest, cost)
    for tile in others:
        if math.prod(tile) <= cost.max_rows:
            time = estimate_time(axes, tile, cost)
            if time < least:
                best, least = tile, time
    return best[0], best[1], best[2]


def grow_tile(axes: Sequence[NeighborhoodAxis], cost: TileCost) -> Size:
    """Tile of small estimated time, found by growing one axis at a time.

    Greedy, so that a compiler that traces it has a few dozen steps to follow.
    """
    choices = [axis_tiles(axis) for axis in axes]
    picks = [0, 0, 0]
    least: float | None = None
    while True:
        best = picks
        for i in range(-1, 3):
            trial = [pick + (i == j) for j, pick in enumerate(picks)]
            if i >= 0 and trial[i] == len(choices[i]):
                continue
            tile = [sizes[pick] for sizes, pick in zip(choices, trial, strict=True)]
            if i >= 0 and math.prod(tile) > cost.max_rows:
                continue
            time = estimate_time(axes, tile, cost)
            if least is None or time < least:
                least, best = time, trial
        if best is picks:
            return choices[0][picks[0]], choices[1][picks[1]], choices[2][picks[2]]
        picks = best
