"""A pattern on a grid, as one value that operators can carry: plain integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrofit.layout.grid import Place, TokenGrid

from .arguments import Size, check_neighborhood, check_window
from .axes import Axis, AxisTables, NeighborhoodAxis, WindowAxis
from .tiles import BLOCK_COST, GATHER_COST, NATIVE_COST, grow_tile, order_axes, search_tile


@dataclass(frozen=True)
class Pattern:
    """Grid and settings of its three axes, all of one kind."""

    grid: TokenGrid
    axes: tuple[Axis, Axis, Axis]

    @property
    def is_dense(self) -> bool:
        """True if every token sees every other."""
        return all(axis.is_whole and axis_dilation(axis) == 1 for axis in self.axes)

    @property
    def order(self) -> Size:
        """Axis numbers, slowest first, in which kernels walk a tile."""
        return order_axes([axis.is_whole for axis in self.axes])

    def tables(
        self,
        device: torch.device | str | None = None,
        shift: Tensor | None = None,
        tile: Size | None = None,
    ) -> list[AxisTables]:
        """Tables of the three axes.

        Args:
            device: Where the tables live.
            shift: int64 `[3]`, in place of the shifts of the settings.
            tile: Queries per tile on each axis; by default what suits gathering.
        """
        tile = tile or self.gather_tile()
        tables = []
        for i, axis in enumerate(self.axes):
            if isinstance(axis, NeighborhoodAxis):
                tables.append(axis.tables(tile[i], device))
            else:
                tables.append(axis.tables(device, None if shift is None else shift[i]))
        return tables

    def gather_tile(self) -> Size:
        """Queries per tile on each axis where keys are gathered and none is skipped."""
        if isinstance(self.axes[0], WindowAxis):
            return self.windows()
        return grow_tile(self.neighborhoods(), GATHER_COST)

    def block_tile(self) -> Size:
        """Queries per tile on each axis for the Triton kernel."""
        if isinstance(self.axes[0], WindowAxis):
            return self.windows()
        return search_tile(self.neighborhoods(), BLOCK_COST)

    def native_tile(self) -> Size:
        """Queries per tile on each axis for the native kernel."""
        if isinstance(self.axes[0], WindowAxis):
            return self.windows()
        return search_tile(self.neighborhoods(), NATIVE_COST)

    def neighborhoods(self) -> list[NeighborhoodAxis]:
        """The axes of a neighborhood."""
        return [axis for axis in self.axes if isinstance(axis, NeighborhoodAxis)]

    def windows(self) -> Size:
        """Window size on each axis."""
        t, y, x = self.axes
        return t.window_size, y.window_size, x.window_size

    def sees(self, query: Place, key: Place, shift: Tensor | None = None) -> Tensor:
        """The definition: whether a token of the grid sees another one, on all axes at once."""
        near = [
            axis.sees(q, k)
            if shift is None or not isinstance(axis, WindowAxis)
            else axis.sees(q, k, shift[i])
            for i, (axis, q, k) in enumerate(zip(self.axes, query, key, strict=True))
        ]
        return near[0] & near[1] & near[2]

    def count_pairs(self) -> int:
        """Query-key pairs that are seen, special tokens included."""
        special = self.grid.num_special_tokens
        inner = math.prod([axis.count_pairs() for axis in self.axes])
        return inner + special * (self.grid.num_tokens + self.grid.num_grid_tokens)

    def encode(self) -> tuple[list[int], list[int]]:
        """Integers for `decode`: the grid and the axes."""
        grid = self.grid
        counts = [grid.num_prefix_tokens, grid.num_suffix_tokens, grid.num_frame_prefix_tokens]
        kind = int(isinstance(self.axes[0], WindowAxis))
        axes = [[*axis[:3], int(axis[3]), int(axis[4])] for axis in self.axes]
        return [*grid.shape, *counts], [kind, *axes[0], *axes[1], *axes[2]]

    @classmethod
    def decode(cls, grid: Sequence[int], axes: Sequence[int]) -> Pattern:
        """The pattern of two lists of integers."""
        t, y, x = [
            WindowAxis(n[0], n[1], n[2], bool(n[3]), bool(n[4]))
            if axes[0]
            else NeighborhoodAxis(n[0], n[1], n[2], n[3], bool(n[4]))
            for n in (axes[1:6], axes[6:11], axes[11:16])
        ]
        return cls(TokenGrid.decode(grid), (t, y, x))


def axis_dilation(axis: Axis) -> int:
    """Distance of the keys on an axis."""
    return axis.dilation if isinstance(axis, NeighborhoodAxis) else 1


def neighborhood_pattern(
    grid: TokenGrid, window_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False
) -> Pattern:
    """The pattern of `neighborhood_attention`.

    Raises:
        ConfigError: If a setting is below 1 or a stride above its window.
    """
    axes = check_neighborhood(grid, window_size, stride, dilation, is_causal)
    t, y, x = [NeighborhoodAxis(*axis) for axis in axes]
    return Pattern(grid, (t, y, x))


def window_pattern(
    grid: TokenGrid,
    window_size: Any,
    shift: Any = 0,
    strided: bool = False,
    is_causal: Any = False,
) -> tuple[Pattern, Tensor | None]:
    """The pattern of `window_attention`, and its shift int64 `[3]` where that is a tensor.

    Raises:
        ConfigError: If a window is below 1, or `shift` is no shift.
    """
    axes = check_window(grid, window_size, shift, is_causal)
    offsets = shift.to(torch.int64).expand(3) if isinstance(shift, Tensor) else None
    t, y, x = [
        WindowAxis(length, window, 0 if offsets is not None else step, strided, causal)
        for length, window, step, causal in axes
    ]
    return Pattern(grid, (t, y, x)), offsets
