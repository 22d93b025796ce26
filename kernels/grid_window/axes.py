"""What a query sees along one axis of the grid, as small tables.

Every pattern of this package is a product over the axes, so a tile of queries needs its keys per
axis only: nothing here grows faster than the axis times its window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Shift = int | Tensor


class AxisTables(NamedTuple):
    """One axis cut into tiles of queries, with the keys each tile visits.

    Attributes:
        queries: Coordinate of each query slot, clamped where the slot is padding, `[n, tile]`.
        is_query: False where the slot is padding, `[n, tile]`.
        keys: Coordinate of each key slot, clamped where the slot is padding, `[n, span]`.
        visible: Which key slots a query slot sees, `[n, tile, span]`; padding queries see all.
        is_full: True if no slot is padding and every query of a tile sees all of its keys.
    """

    queries: Tensor
    is_query: Tensor
    keys: Tensor
    visible: Tensor
    is_full: bool

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tiles, query slots per tile, key slots per tile."""
        return self.keys.shape[0], self.queries.shape[1], self.keys.shape[1]


def first_and_last(
    query: Tensor, group_length: Tensor, window_size: int, stride: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """First and last key of each query, all three in coordinates of one dilation group."""
    last = group_length - 1
    size = torch.clamp(group_length, max=window_size)
    if is_causal:
        leader = torch.minimum(query // stride * stride + stride - 1, last)
        return torch.clamp(leader - window_size + 1, min=0), query
    leader = torch.minimum(query // stride * stride + stride // 2, last)
    left = size // 2
    center = torch.maximum(torch.minimum(leader, last - (size - 1 - left)), left)
    return center - left, center - left + size - 1


def first_key(
    length: int,
    window_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Smallest key coordinate that each query of an axis sees.

    The keys are `first, first + dilation, ...`: `window_size` of them (fewer where the dilation
    group is shorter), or up to the query itself on a causal axis.

    Returns:
        int64, `[length]`.
    """
    coordinate = torch.arange(length, device=device)
    group = coordinate % dilation
    group_length = (length - group + dilation - 1) // dilation
    first, _ = first_and_last(coordinate // dilation, group_length, window_size, stride, is_causal)
    return first * dilation + group


def neighborhood_span(length: int, window_size: int, stride: int, dilation: int, tile: int) -> int:
    """Keys that a tile of queries visits on one axis; `tile` divides `stride` or the reverse."""
    longest = -(-length // dilation)
    return min(longest, window_size + max(tile - stride, 0))


def neighborhood_tables(
    length: int,
    window_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    tile: int,
    device: torch.device | str | None = None,
) -> AxisTables:
    """Tables of a neighborhood axis, a tile of queries inside one dilation group each.

    Args:
        length: Tokens on the axis.
        window_size: Keys per query.
        stride: Queries that share one window.
        dilation: Distance of neighboring keys.
        is_causal: True if a query sees no key behind it.
        tile: Queries per tile, a multiple or a divisor of `stride`.
        device: Where the tables live.
    """
    longest = -(-length // dilation)
    tiles = -(-longest // tile)
    span = neighborhood_span(length, window_size, stride, dilation, tile)
    group = torch.arange(dilation * tiles, device=device)[:, None] // tiles  # [n, 1]
    start = torch.arange(dilation * tiles, device=device)[:, None] % tiles * tile
    group_length = (length - group + dilation - 1) // dilation
    query = start + torch.arange(tile, device=device)  # [n, tile], in the group
    is_query = query < group_length
    query = torch.minimum(query, group_length - 1).clamp(min=0)
    first, last = first_and_last(query, group_length, window_size, stride, is_causal)
    key = first[:, :1] + torch.arange(span, device=device)  # [n, span]
    visible = (key[:, None] >= first[..., None]) & (key[:, None] <= last[..., None])
    visible = visible | ~is_query[..., None]
    key = torch.minimum(key, group_length - 1).clamp(min=0)
    is_full = span == longest and window_size >= longest and length % dilation == 0
    return AxisTables(
        (query * dilation + group).clamp(max=length - 1),
        is_query,
        (key * dilation + group).clamp(max=length - 1),
        visible,
        is_full and longest % tile == 0 and not is_causal,
    )


def window_tables(
    length: int,
    window_size: int,
    *,
    shift: Shift = 0,
    strided: bool = False,
    is_causal: bool = False,
    device: torch.device | str | None = None,
) -> AxisTables:
    """Tables of a partitioned axis: each window is a tile whose queries see its keys.

    Args:
        length: Tokens on the axis.
        window_size: Tokens per window, the last one may be short.
        shift: Cyclic shift; the windows are cut after coordinate `shift` came to 0.
        strided: True for windows of every n-th token, n the number of windows.
        is_causal: True if a query sees no key behind it.
        device: Where the tables live.
    """
    tiles = -(-length // window_size)
    size = -(-length // tiles) if strided else min(window_size, length)
    tile = torch.arange(tiles, device=device)[:, None]
    slot = torch.arange(size, device=device)
    rolled = slot * tiles + tile if strided else tile * size + slot  # [n, size]
    is_token = rolled < length
    coordinate = (rolled.clamp(max=length - 1) + shift) % length
    visible = is_token[:, None, :].expand(tiles, size, size)
    if is_causal:
        visible = visible & (coordinate[:, None, :] <= coordinate[:, :, None])
    visible = visible | ~is_token[..., None]
    is_full = size * tiles == length and not is_causal
    return AxisTables(coordinate, is_token, coordinate, visible, is_full)
