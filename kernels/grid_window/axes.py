"""What a query sees along one axis of the grid, as small tables.

Every pattern of this package is a product over the axes, so a tile of queries needs its keys per
axis only: nothing here grows faster than an axis times the overlap of its tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AxisTables(NamedTuple):
    """One axis cut into tiles of queries, with the keys that each tile visits.

    Attributes:
        queries: Coordinate of each query slot, `[n, tile]`.
        is_query: False where the slot is padding, which repeats the last query before it,
            `[n, tile]`.
        keys: Coordinate of each key slot, repeated where the slot is padding, `[n, span]`.
        low: First key slot that a query slot sees, `[n, tile]`.
        high: One past the last, `[n, tile]`.
        hides_keys: False if every query sees all keys of its tile that any query of it sees.
        is_masked: False if every query sees all key slots of its tile: no slot is padding either.
    """

    queries: Tensor
    is_query: Tensor
    keys: Tensor
    low: Tensor
    high: Tensor
    hides_keys: bool
    is_masked: bool

    @property
    def num_tiles(self) -> int:
        """Tiles on the axis."""
        return self.keys.shape[0]

    @property
    def tile(self) -> int:
        """Query slots per tile."""
        return self.queries.shape[1]

    @property
    def span(self) -> int:
        """Key slots per tile."""
        return self.keys.shape[1]


class NeighborhoodAxis(NamedTuple):
    """Settings of an axis of `neighborhood_attention`, the window clamped to the longest group."""

    length: int
    window_size: int
    stride: int
    dilation: int
    is_causal: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest dilation group."""
        return -(-self.length // self.dilation)

    @property
    def is_whole(self) -> bool:
        """True if every query sees its whole dilation group."""
        return self.window_size >= self.longest and not self.is_causal

    def span(self, tile: int) -> int:
        """Keys that a tile visits; `tile` is a multiple or a divisor of the stride."""
        return min(self.longest, self.window_size + max(tile - self.stride, 0))

    def num_tiles(self, tile: int) -> int:
        """Tiles on the axis."""
        return self.dilation * -(-self.longest // tile)

    def tables(self, tile: int, device: torch.device | str | None = None) -> AxisTables:
        """Tables for tiles of `tile` queries of one dilation group."""
        tiles, span = -(-self.longest // tile), self.span(tile)
        number = torch.arange(self.dilation * tiles, device=device)[:, None]
        group = number // tiles  # [n, 1]
        group_length = (self.length - group + self.dilation - 1) // self.dilation
        query = number % tiles * tile + torch.arange(tile, device=device)  # in the group
        is_query = query < group_length
        query = torch.minimum(query, group_length - 1).clamp(min=0)
        first, last = first_and_last(
            query, group_length, self.window_size, self.stride, self.is_causal
        )
        key = first[:, :1] + torch.arange(span, device=device)
        key = torch.minimum(key, group_length - 1).clamp(min=0)
        hides_keys = self.is_causal or not (tile <= self.stride or self.is_whole)
        return AxisTables(
            query * self.dilation + group,
            is_query,
            key * self.dilation + group,
            first - first[:, :1],
            last + 1 - first[:, :1],
            hides_keys,
            hides_keys or self.length % self.dilation != 0,
        )

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """The definition: whether a coordinate of the axis sees another one."""
        group, is_near = query % self.dilation, query % self.dilation == key % self.dilation
        group_length = (self.length - group + self.dilation - 1) // self.dilation
        query, key = query // self.dilation, key // self.dilation
        first, last = first_and_last(
            query, group_length, self.window_size, self.stride, self.is_causal
        )
        return is_near & (key >= first) & (key <= last)

    def count_pairs(self) -> int:
        """Query-key pairs on the axis."""
        query = torch.arange(self.length, device="cpu")
        group_length = (self.length - query % self.dilation + self.dilation - 1) // self.dilation
        first, last = first_and_last(
            query // self.dilation, group_length, self.window_size, self.stride, self.is_causal
        )
        return int((last - first + 1).sum())


class WindowAxis(NamedTuple):
    """Settings of an axis of `window_attention`, the window clamped to the axis."""

    length: int
    window_size: int
    shift: int
    is_strided: bool
    is_causal: bool

    @property
    def num_windows(self) -> int:
        """Windows on the axis."""
        return -(-self.length // self.window_size)

    @property
    def is_whole(self) -> bool:
        """True if one window covers the axis and hides nothing."""
        return self.num_windows == 1 and not self.is_causal

    def tables(
        self, device: torch.device | str | None = None, shift: Tensor | None = None
    ) -> AxisTables:
        """Tables with one tile per window; `shift` (int64 `[]`) stands in for the field."""
        tiles = self.num_windows
        size = -(-self.length // tiles) if self.is_strided else self.window_size
        tile = torch.arange(tiles, device=device)[:, None]
        slot = torch.arange(size, device=device)
        step, start = (tiles, tile) if self.is_strided else (1, tile * size)
        count = ((self.length - start + step - 1) // step).clamp(max=size)  # [n, 1]
        inside = torch.minimum(slot, count - 1)
        offset = self.shift if shift is None else shift
        coordinate = (start + inside * step + offset) % self.length
        low = torch.zeros_like(inside)
        high = count.expand(tiles, size)
        if self.is_causal:  # in ascending order what a query sees is one interval again
            coordinate = torch.where(slot < count, coordinate, self.length).sort(1).values
            coordinate = coordinate.gather(1, inside)
            high = torch.minimum(high, slot + 1)
        is_masked = self.is_causal or size * tiles != self.length
        return AxisTables(
            coordinate, slot < count, coordinate, low, high, self.is_causal, is_masked
        )

    def group(self, place: Tensor, shift: Tensor | None = None) -> Tensor:
        """Number of the window that a coordinate is in."""
        rolled = (place - (self.shift if shift is None else shift)) % self.length
        return rolled % self.num_windows if self.is_strided else rolled // self.window_size

    def sees(self, query: Tensor, key: Tensor, shift: Tensor | None = None) -> Tensor:
        """The definition: whether a coordinate of the axis sees another one."""
        is_near = self.group(query, shift) == self.group(key, shift)
        return is_near & (key <= query) if self.is_causal else is_near

    def count_pairs(self) -> int:
        """Query-key pairs on the axis."""
        sizes = self.group(torch.arange(self.length, device="cpu")).bincount()
        return int((sizes * (sizes + 1) // 2 if self.is_causal else sizes**2).sum())


Axis = NeighborhoodAxis | WindowAxis


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
