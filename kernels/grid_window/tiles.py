"""Choice of the query tile of a neighborhood: few visited pairs against long enough tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .arguments import Size
from .axes import neighborhood_span

NeighborhoodAxis = tuple[int, int, int, int, bool]


def axis_tiles(axis: NeighborhoodAxis) -> list[int]:
    """Tile lengths worth trying on one axis: multiples and divisors of its stride."""
    length, window_size, stride, dilation, _ = axis
    longest = -(-length // dilation)
    if window_size >= longest:
        return [longest] if longest % stride == 0 else [-(-longest // stride) * stride]
    sizes = {n for n in range(1, stride + 1) if stride % n == 0}
    sizes |= {n * stride for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)}
    return sorted(n for n in sizes if n < longest + stride)


def axis_cost(axis: NeighborhoodAxis, tile: int) -> tuple[int, int]:
    """Tiles on the axis, padding included, and key slots per tile."""
    length, window_size, stride, dilation, _ = axis
    longest = -(-length // dilation)
    return dilation * -(-longest // tile), neighborhood_span(
        length, window_size, stride, dilation, tile
    )


def estimate_time(axes: Sequence[NeighborhoodAxis], tile: Sequence[int], rows: int) -> int:
    """Visited pairs, dearer the fewer query rows share a key, in arbitrary units."""
    time = math.prod(tile) + rows
    keys = 1
    for axis, size in zip(axes, tile, strict=True):
        tiles, span = axis_cost(axis, size)
        time *= tiles
        keys *= span
    return time * (keys + 32)


def choose_tile(axes: Sequence[NeighborhoodAxis], rows: int) -> Size:
    """Tile of least estimated time, found by growing one axis at a time.

    Greedy, so that a compiler that traces it has a few dozen steps to follow.

    Args:
        axes: `(length, window, stride, dilation, is_causal)` of each axis.
        rows: Query rows at which a tile runs at half speed.
    """
    choices = [axis_tiles(axis) for axis in axes]
    picks = [0, 0, 0]
    time = estimate_time(axes, [sizes[0] for sizes in choices], rows)
    while True:
        best = picks
        for i in range(3):
            if picks[i] + 1 < len(choices[i]):
                trial = [pick + (i == j) for j, pick in enumerate(picks)]
                tile = [sizes[pick] for sizes, pick in zip(choices, trial, strict=True)]
                trial_time = estimate_time(axes, tile, rows)
                if trial_time < time:
                    time, best = trial_time, trial
        if best is picks:
            return choices[0][picks[0]], choices[1][picks[1]], choices[2][picks[2]]
        picks = best
