"""Which tile of queries shares its keys: few visited pairs against tiles that are worth packing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .arguments import Size
from .axes import NeighborhoodAxis

MULTIPLES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)


class TileCost(NamedTuple):
    """What a route pays for a tile, in the time of one query-key pair.

    Attributes:
        per_key: For bringing one key of a tile near, whatever the number of rows.
        per_row: For one row of a tile, whatever the number of keys.
        skip: Hidden keys in a row that are needed to skip any; 0 if all keys of a tile are paid.
        max_rows: Largest tile.
    """

    per_key: int
    per_row: int
    skip: int
    max_rows: int


GATHER_COST = TileCost(per_key=32, per_row=32, skip=0, max_rows=512)
NATIVE_COST = TileCost(per_key=10, per_row=24, skip=32, max_rows=1024)


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


def estimate_time(
    axes: Sequence[NeighborhoodAxis], tile: Sequence[int], order: Size, cost: TileCost
) -> float:
    """Time of all tiles, in query-key pairs."""
    tiles = math.prod([axis.num_tiles(n) for axis, n in zip(axes, tile, strict=True)])
    rows = math.prod(tile)
    keys, seen = 1, 1.0  # keys of a tile, and keys paid per row
    for i in reversed(order):
        span, window = axes[i].span(tile[i]), min(axes[i].window_size, axes[i].longest)
        hidden = (span - window) * (min(1.0, cost.skip / keys) if cost.skip else 1.0)
        seen *= window + hidden
        keys *= span
    return tiles * (rows * (seen + cost.per_row) + cost.per_key * keys)


def choose_tile(axes: Sequence[NeighborhoodAxis], order: Size, cost: TileCost) -> Size:
    """Tile of least estimated time, found by growing one axis at a time.

    Greedy, so that a compiler that traces it has a few dozen steps to follow.
    """
    choices = [axis_tiles(axis) for axis in axes]

    def time(picks: Sequence[int]) -> float:
        tile = [sizes[pick] for sizes, pick in zip(choices, picks, strict=True)]
        return estimate_time(axes, tile, order, cost)

    picks = _descend([len(sizes) for sizes in choices], time, choices, cost.max_rows)
    return choices[0][picks[0]], choices[1][picks[1]], choices[2][picks[2]]


def _descend(
    counts: list[int],
    time: Callable[[Sequence[int]], float],
    choices: list[list[int]],
    max_rows: int,
) -> list[int]:
    picks = [0, 0, 0]
    least = time(picks)
    while True:
        best = picks
        for i in range(3):
            trial = [pick + (i == j) for j, pick in enumerate(picks)]
            if trial[i] == counts[i]:
                continue
            if math.prod([sizes[p] for sizes, p in zip(choices, trial, strict=True)]) > max_rows:
                continue
            trial_time = time(trial)
            if trial_time < least:
                least, best = trial_time, trial
        if best is picks:
            return picks
        picks = best
