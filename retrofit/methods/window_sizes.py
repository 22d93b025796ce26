"""Window sizes as a user gives them: keys per axis, or the fraction of the work to keep."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch

Size = tuple[int, int, int]


def per_axis(value: int | Size) -> Size:
    """One value for frames, height and width from one value or three."""
    return (value, value, value) if isinstance(value, int) else value


def check_window_settings(window_size: int | Size | None, keep: float | None) -> list[str]:
    """What is wrong with the two settings, of which one must be given."""
    problems = []
    if window_size is not None and keep is not None:
        problems.append(
            f"window_size, keep: expected one of them, got {window_size} and {keep}. Leave one out."
        )
    if window_size is not None:
        problems += check_at_least_one("window_size", window_size)
    return problems + check_keep(keep)


def covers(shape: Sequence[int], size: Size) -> bool:
    """Whether a window is the whole grid."""
    return size[0] >= shape[0] and size[1] >= shape[1] and size[2] >= shape[2]


def check_at_least_one(name: str, value: int | Size) -> list[str]:
    """What is wrong with sizes that must be 1 or more."""
    if min(per_axis(value)) < 1:
        return [f"{name}: expected 1 or more, got {value}."]
    return []


def check_keep(keep: float | None) -> list[str]:
    """What is wrong with the fraction of the work that remains."""
    if keep is not None and not 0 < keep <= 1:
        return [f"keep: expected 0 < keep <= 1, the fraction that remains, got {keep}."]
    return []


def partition_fraction(length: int, window: int) -> float:
    """Fraction of an axis's pairs inside windows of a partition; the last window may be short."""
    window = min(window, length)
    whole, rest = length // window, length % window
    return (whole * window**2 + rest**2) / length**2


def choose_partition(shape: Size, keep: float) -> Size:
    """The windows nearest to a cube that cut a grid so that about `keep` of its pairs remain.

    Only `keep` 1 is the whole grid: what is cut into windows keeps at most half.
    """
    return _remember(_choose_partition, shape, keep)


def choose_neighborhood(shape: Size, keep: float) -> Size:
    """The window around a query that is nearest to a cube and to `keep` of the grid."""
    return _remember(_choose_neighborhood, shape, keep)


def _remember(choose: Callable[[Size, float], Size], shape: Size, keep: float) -> Size:
    """The size chosen at an earlier call; a traced graph has symbols for lengths and chooses."""
    if torch.compiler.is_compiling():
        return choose(shape, keep)
    return _call_once(choose, shape, keep)


@functools.cache
def _call_once(choose: Callable[[Size, float], Size], shape: Size, keep: float) -> Size:
    return choose(shape, keep)


def _choose_partition(shape: Size, keep: float) -> Size:
    if shape[0] == shape[1] == 1:  # a text: as many windows as 1 / keep, whatever its length
        counts = [count for count in (int(1 / keep), math.ceil(1 / keep)) if count > 1 or keep == 1]
        return 1, 1, -(-shape[2] // min(counts, key=lambda count: max(count * keep, 1 / count)))

    def sizes(length: int, side: float) -> list[int]:
        counts = sorted({math.floor(length / side), math.ceil(length / side)})
        return [-(-length // min(max(count, 1), length)) for count in counts]

    return _nearest(shape, keep, sizes, partition_fraction)


def _choose_neighborhood(shape: Size, keep: float) -> Size:
    if shape[0] == shape[1] == 1:
        return 1, 1, max(1, int(keep * shape[2] + 0.5))

    def sizes(length: int, side: float) -> list[int]:
        return [min(max(size, 1), length) for size in sorted({math.floor(side), math.ceil(side)})]

    return _nearest(shape, keep, sizes, lambda length, window: window / length)


def plain_shape(shape: Sequence[int]) -> Size:
    """A grid's shape in plain numbers.

    While a graph is traced for any size a length is a symbol, that can't be sorted; the length of a
    range never is one, and the graph is then for this size.
    """
    frames, height, width = (len(range(length)) for length in shape)
    return frames, height, width


def _nearest(
    shape: Size,
    keep: float,
    sizes: Callable[[int, float], list[int]],
    fraction: Callable[[int, int], float],
) -> Size:
    """Of the windows next to a cube the one whose share of the pairs is nearest to `keep`.

    Args:
        shape: Tokens along frames, height and width.
        keep: Fraction of the pairs that is wanted.
        sizes: Windows near a length that an axis can have.
        fraction: What one window keeps of one axis's pairs.
    """
    shape = plain_shape(shape)
    sides = _clipped_cube(shape, keep)
    choices = [sizes(length, side) for length, side in zip(shape, sides, strict=True)]

    def distance(windows: tuple[int, ...]) -> tuple[bool, float]:
        kept = math.prod(map(fraction, shape, windows))
        return kept == 1.0 and keep < 1.0, max(kept / keep, keep / kept)

    frames, height, width = min(itertools.product(*choices), key=distance)
    return frames, height, width


def _clipped_cube(shape: Size, keep: float) -> list[float]:
    """Sides of a box of `keep` of the volume: equal, or the whole axis where that is shorter."""
    sides = [0.0] * len(shape)
    volume, axes = keep * math.prod(shape), len(shape)
    for axis in sorted(range(len(shape)), key=lambda axis: shape[axis]):
        sides[axis] = min(float(shape[axis]), volume ** (1 / axes))
        volume, axes = volume / sides[axis], axes - 1
    return sides
