"""The tables of an axis turned round: which queries see each key, for the gradients of keys.

What a query sees on an axis is an interval of its dilation group, and neither end of it moves back
from one query to the next. So the queries that see a key are an interval too, and the tables have
the form of `AxisTables`: its `queries` hold keys here, and its `keys` the queries that see them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Size
from .axes import Axis, AxisTables, NeighborhoodAxis, WindowAxis, first_and_last
from .pattern import Pattern


def key_tables(
    pattern: Pattern, device: torch.device | str | None, shift: Tensor | None, tile: Size
) -> list[AxisTables]:
    """Tables of the three axes with keys as rows.

    Args:
        pattern: What is seen.
        device: Where the tables live.
        shift: int64 `[3]`, in place of the shifts of the settings.
        tile: Keys per tile on each axis.
    """
    return [
        turn_axis(axis, tile[i], device, None if shift is None else shift[i])
        for i, axis in enumerate(pattern.axes)
    ]


def turn_axis(
    axis: Axis, tile: int, device: torch.device | str | None, shift: Tensor | None
) -> AxisTables:
    """Tables of one axis with keys as rows; windows are their own tiles."""
    if isinstance(axis, WindowAxis):
        tables = axis.tables(device, shift)
        if not axis.is_causal:
            return tables
        slot = torch.arange(tables.tile, device=device).expand_as(tables.low)
        count = tables.is_query.sum(1, keepdim=True).expand_as(tables.high)
        return tables._replace(low=slot, high=count)
    return _neighborhood_tables(axis, tile, device)


def _neighborhood_tables(
    axis: NeighborhoodAxis, tile: int, device: torch.device | str | None
) -> AxisTables:
    """Made on the CPU, where the longest interval is known without waiting, then moved."""
    groups = [_group_tables(axis, group, tile) for group in range(axis.dilation)]
    key, is_key, start, low, high = (torch.cat(parts) for parts in zip(*groups, strict=True))
    width = (high - start).masked_fill(~is_key, 0).amax(1, keepdim=True)
    query = start + torch.arange(max(1, int(width.max())))
    number = torch.arange(axis.dilation).repeat_interleave(groups[0][0].shape[0])[:, None]
    last = (axis.length - number + axis.dilation - 1) // axis.dilation - 1
    query = torch.minimum(query, last).clamp(min=0)
    low, high = low - start, high - start
    hides = bool((((low > 0) | (high < width)) & is_key).any())
    return AxisTables(
        (key * axis.dilation + number).to(device),
        is_key.to(device),
        (query * axis.dilation + number).to(device),
        low.to(device),
        high.to(device),
        hides,
        hides or not bool(is_key.all()),
    )


def _group_tables(axis: NeighborhoodAxis, group: int, tile: int) -> tuple[Tensor, ...]:
    """Keys `[n, tile]`, which are keys, first query of a tile `[n, 1]`, first and past the last.

    All in coordinates of the dilation group; every group has as many tiles as the longest.
    """
    length = (axis.length - group + axis.dilation - 1) // axis.dilation
    query = torch.arange(length)
    first, last = first_and_last(
        query, torch.tensor(length), axis.window_size, axis.stride, axis.is_causal
    )
    key = torch.arange(-(-axis.longest // tile) * tile).view(-1, tile)
    is_key = key < length
    key = torch.minimum(key, torch.tensor(max(length - 1, 0)))
    low = torch.searchsorted(last.contiguous(), key)
    high = torch.searchsorted(first.contiguous(), key, right=True)
    high = torch.maximum(low, high)  # a key that nobody sees
    return key, is_key, low[:, :1], low, high
