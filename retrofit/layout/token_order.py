"""The orders in which the tokens of a grid are walked: raster, along a Hilbert curve, in tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from retrofit.layout.grid import TokenGrid

TokenOrder = Literal["raster", "hilbert", "tiles"]
_Step = tuple[int, int]


def token_order(
    grid: TokenGrid,
    order: TokenOrder,
    *,
    tile_size: tuple[int, int, int] = (1, 8, 8),
    device: torch.device | str = "cpu",
) -> Tensor:
    """The order in which the grid tokens are walked.

    Args:
        grid: Its special tokens do not count.
        order: `raster` (frame, row, column), `hilbert` (along a curve in one frame after the
            other), or `tiles` (boxes of the grid one after the other, raster inside).
        tile_size: Frames, rows and columns of a tile; the last tile of an axis may be short.
        device: Where the result lives.

    Returns:
        int64 `[grid.num_grid_tokens]`, the index into the raster order of each token in turn.
    """
    if order == "raster":
        return torch.arange(grid.num_grid_tokens, device=device)
    if order == "tiles":
        return tile_order(grid, tile_size, device=device)
    # the length of a range is a plain number in traced code too, as the curve's constants must be
    inside = _hilbert_tensor(len(range(grid.height)), len(range(grid.width))).to(device)
    starts = torch.arange(grid.frames, device=device)[:, None] * (grid.height * grid.width)
    return (starts + inside).flatten()


def tile_order(
    grid: TokenGrid, tile_size: tuple[int, int, int], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Raster indices of the grid tokens tile by tile, int64 `[grid.num_grid_tokens]`."""
    number = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    for axis, (length, size) in enumerate(zip(grid.shape, tile_size, strict=True)):
        shape = [-1 if axis == other else 1 for other in range(3)]
        along = (torch.arange(length, device=device) // size).view(shape)
        number = number * -(-length // size) + along  # [T, H, W] at the end
    return number.flatten().argsort(stable=True)


@torch.compiler.assume_constant_result
def _hilbert_tensor(height: int, width: int) -> Tensor:
    return torch.tensor(hilbert_order(height, width))


@lru_cache(maxsize=64)
def hilbert_order(height: int, width: int) -> tuple[int, ...]:
    """Raster indices of a frame along a generalised Hilbert curve, for any height and width.

    Neighbors on the curve are neighbors in the frame, but for one diagonal step where both sides
    allow none. Paper: https://arxiv.org/abs/2509.07120 (optional token order).
    """
    along_x, along_y = (width, 0), (0, height)
    longer_first = (along_x, along_y) if width >= height else (along_y, along_x)
    return tuple(y * width + x for x, y in _walk((0, 0), *longer_first))


def _walk(at: _Step, major: _Step, minor: _Step) -> Iterator[_Step]:
    """Places of the rectangle that `major` and `minor` span from `at`, walked along `major`."""
    long, short = abs(sum(major)), abs(sum(minor))
    if short == 1:
        yield from (_add(at, _unit(major), times=i) for i in range(long))
        return
    if long == 1:
        yield from (_add(at, _unit(minor), times=i) for i in range(short))
        return
    half_major, half_minor = _halve(major), _halve(minor)
    if 2 * long > 3 * short:  # wide: two halves side by side
        half_major = _make_even(half_major, major)
        yield from _walk(at, half_major, minor)
        yield from _walk(_add(at, half_major), _add(major, half_major, times=-1), minor)
        return
    half_minor = _make_even(half_minor, minor)
    rest = _add(major, half_major, times=-1)
    turn = _add(_add(at, _shorten(major)), _shorten(half_minor))
    yield from _walk(at, half_minor, half_major)
    yield from _walk(_add(at, half_minor), major, _add(minor, half_minor, times=-1))
    yield from _walk(turn, _negate(half_minor), _negate(rest))


def _add(a: _Step, b: _Step, times: int = 1) -> _Step:
    return a[0] + b[0] * times, a[1] + b[1] * times


def _negate(step: _Step) -> _Step:
    return -step[0], -step[1]


def _unit(step: _Step) -> _Step:
    return (step[0] > 0) - (step[0] < 0), (step[1] > 0) - (step[1] < 0)


def _halve(step: _Step) -> _Step:
    return step[0] // 2, step[1] // 2


def _shorten(step: _Step) -> _Step:
    return _add(step, _unit(step), times=-1)


def _make_even(half: _Step, whole: _Step) -> _Step:
    """An even number of steps, so that both halves can be entered and left at their corners."""
    return _add(half, _unit(whole)) if sum(half) % 2 and abs(sum(whole)) > 2 else half
