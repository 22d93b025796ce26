"""Patches of a picture and the ideal shapes they are compared with, for `check.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

LEAST_OVERLAP = 0.78  # intersection over union with the best ideal shape
HOLE = 0.006  # of the patch: smaller holes are noise
PATCH_SIDE = 72  # longer side of a patch while it is compared, pixels


def components(mask: Mask) -> list[Mask]:
    """Return the parts of a mask that hang together along edges, as masks of its size."""
    parents: list[int] = []

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    labels = np.full(mask.shape, -1)
    above: list[tuple[int, int, int]] = []
    for row, line in enumerate(mask):
        ends = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        runs = []
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            parents.append(len(parents))
            number = parents[-1]
            for first, last, other in above:
                if first < stop and start < last:
                    parents[root(other)] = root(number)
            runs.append((int(start), int(stop), number))
            labels[row, start:stop] = number
        above = runs
    if not parents:
        return []
    roots = np.array([root(index) for index in range(len(parents))])
    named = np.where(labels >= 0, roots[labels], -1)
    return [named == number for number in np.unique(roots)]


def grow(mask: Mask) -> Mask:
    """Return the mask with its neighbours, corners included."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    grown: Mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return grown


def bounding_box(mask: Mask) -> tuple[slice, slice]:
    """Return the part of the picture that holds the mask, with a rim of a pixel where it can."""
    if not mask.any():
        return slice(0, 0), slice(0, 0)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(0, int(rows[0]) - 1), max(0, int(columns[0]) - 1)
    return slice(top, int(rows[-1]) + 2), slice(left, int(columns[-1]) + 2)


def distance_to_background(mask: Mask) -> Array:
    """Return every pixel's distance to the nearest one outside the mask (Euclidean, in pixels).

    What lies beyond the picture counts as neither inside nor outside.
    """
    around = bounding_box(mask)
    inner = mask[around]
    if inner.size < mask.size:
        result = np.zeros(mask.shape)
        result[around] = distance_to_background(inner)
        return result
    height, width = mask.shape
    far = float(height + width)
    column = np.where(mask, far, 0.0)
    for row in range(1, height):
        column[row] = np.minimum(column[row], column[row - 1] + 1)
    for row in range(height - 2, -1, -1):
        column[row] = np.minimum(column[row], column[row + 1] + 1)
    squares = np.minimum(column, far) ** 2
    steps = (np.arange(width)[:, None] - np.arange(width)[None, :]) ** 2.0
    result = np.empty((height, width))
    for row in range(height):
        result[row] = np.sqrt((steps + squares[row][None, :]).min(axis=1))
    return result


@dataclass(frozen=True)
class Ideal:
    """An ideal shape: a polygon around the origin, or a disc with a hole of `inner`."""

    name: str
    corners: Array | None = None
    inner: float = 0.0

    def area(self) -> float:
        """Return the area at radius 1."""
        if self.corners is None:
            return math.pi * (1 - self.inner**2)
        x, y = self.corners.T
        return float(0.5 * abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()))

    def covers(self, x: Array, y: Array) -> Mask:
        """Tell which points lie in the shape of radius 1."""
        if self.corners is None:
            length = np.hypot(x, y)
            disc: Mask = (length <= 1) & (length >= self.inner)
            return disc
        inside = np.zeros(x.shape, dtype=bool)
        following = np.roll(self.corners, -1, axis=0)
        for (ax, ay), (bx, by) in zip(self.corners, following, strict=True):
            if ay != by:
                inside ^= ((y >= ay) != (y >= by)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
        return inside


def _turned(corners: Array, degrees: float) -> Array:
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turned: Array = corners @ turn
    return turned


def _regular(count: int, radii: tuple[float, ...] = (1.0,)) -> Array:
    angles = -math.pi / 2 + 2 * math.pi * np.arange(count) / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, count)[:, None]


def _cross(arm: float) -> Array:
    quarter = np.array([[arm, 1.0], [arm, arm], [1.0, arm]])
    return np.concatenate([_turned(quarter, -90 * turn) for turn in range(4)])


def ideals(*, turned: bool) -> list[Ideal]:
    """Return the ideal shapes; with `turned` at many angles, else as they mostly stand."""
    square, triangle = _turned(_regular(4), 45), _regular(3)
    flat = triangle * np.array([1.0, 0.8])
    tall = triangle * np.array([1.0, 1.25])
    tenth = 10 if turned else 1  # angles per shape, at most
    found = [Ideal("circle")]
    found += [Ideal("ring", inner=inner) for inner in (0.35, 0.45, 0.55, 0.65, 0.75, 0.85)]
    found += [Ideal("square", _turned(square, 15 * turn)) for turn in range(min(6, tenth))]
    for corners in (triangle, flat, tall):
        found += [Ideal("triangle", _turned(corners, 12 * turn)) for turn in range(tenth)]
    for arm in (0.2, 0.28, 0.36, 0.44):
        found += [Ideal("cross", _turned(_cross(arm), 15 * turn)) for turn in range(min(6, tenth))]
    for inner in (0.38, 0.45, 0.54):
        star = _regular(10, (1.0, inner))
        found += [Ideal("star", _turned(star, 12 * turn)) for turn in range(min(6, tenth))]
    return found


def name_shape(cover: Array) -> str | None:
    """Name the shape of a patch.

    Args:
        cover: How much of each pixel of the whole picture the patch fills, `[H, W]`.

    Returns:
        One of the shapes, or None where none is like it.
    """
    mask, cut = _enlarged(cover)
    has_hole = sum(hole.sum() > HOLE * mask.sum() for hole in holes(mask))
    if has_hole > 1:
        return None
    name, overlap = _best_centered(mask, turned=True)
    if cut and overlap < 0.92:
        name, overlap = max((name, overlap), _best_cut(mask), key=lambda item: item[1])
    whole_ring = name == "ring" and (has_hole or cut)
    if (
        overlap < LEAST_OVERLAP
        or (has_hole and name != "ring")
        or (name == "ring" and not whole_ring)
    ):
        return None
    return name


def _enlarged(cover: Array) -> tuple[Mask, bool]:
    """Cut the patch out at a common size; tell whether the picture's edge cuts it off."""
    rows, columns = np.flatnonzero((cover > 0.5).any(1)), np.flatnonzero((cover > 0.5).any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = cover.shape
    cut = top == 0 or left == 0 or bottom == height or right == width
    scale = PATCH_SIDE / max(bottom - top, right - left)
    part = np.clip(cover[top:bottom, left:right], 0, 1).astype(np.float32)
    size = (max(4, round((right - left) * scale)), max(4, round((bottom - top) * scale)))
    mask = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR)) > 0.5
    # A rim where the picture goes on; none where it ends, since there the patch may go on too.
    rim = max(2, PATCH_SIDE // 8)
    sides = ((rim * (top > 0), rim * (bottom < height)), (rim * (left > 0), rim * (right < width)))
    return np.pad(mask, sides), bool(cut)


def holes(mask: Mask) -> list[Mask]:
    """Return the parts of the background that the patch encloses."""
    parts = components(~np.pad(mask, 1))
    return [part[1:-1, 1:-1] for part in parts if not part[0, 0]]


def _overlap(first: Mask, second: Mask) -> float:
    return float((first & second).sum() / max(1, (first | second).sum()))


def _best_centered(mask: Mask, *, turned: bool) -> tuple[str, float]:
    """Return the ideal shape that overlaps most when it has the patch's area and centroid."""
    y, x = np.indices(mask.shape) + 0.5
    center_x, center_y, area = x[mask].mean(), y[mask].mean(), mask.sum()
    results = []
    for ideal in ideals(turned=turned):
        radius = math.sqrt(area / ideal.area())
        # The centroid of all the shapes is the origin, but for the star to within rounding.
        covered = ideal.covers((x - center_x) / radius, (y - center_y) / radius)
        results.append((ideal.name, _overlap(mask, covered)))
    return max(results, key=lambda item: item[1])


def _best_cut(mask: Mask) -> tuple[str, float]:
    """Return the ideal shape that overlaps most when it may reach beyond the picture."""
    fits = [Fit(ideal, mask) for ideal in ideals(turned=False)]
    best = sorted(fits, key=lambda fit: -fit.overlap)[:6]
    return max((fit.climb() for fit in best), key=lambda item: item[1])


class Fit:
    """The search for the place and radius at which an ideal shape overlaps most with a patch."""

    def __init__(self, ideal: Ideal, mask: Mask):
        """Start from the best of a coarse grid of places and radii."""
        step = 2
        self.ideal, self.mask = ideal, mask[step // 2 :: step, step // 2 :: step]
        self.y, self.x = (np.indices(self.mask.shape) + 0.5) * step
        self.longest = float(max(np.ptp(self.x[self.mask]), np.ptp(self.y[self.mask])))
        right, bottom = self.x.max(), self.y.max()
        spots = [
            np.array([u * right, v * bottom, radius * self.longest])
            for u in (0.0, 0.25, 0.5, 0.75, 1.0)
            for v in (0.0, 0.25, 0.5, 0.75, 1.0)
            for radius in (0.5, 0.62, 0.8)
        ]
        self.overlap, _, self.spot = max(
            (self.score(spot), i, spot) for i, spot in enumerate(spots)
        )

    def score(self, spot: Array) -> float:
        """Return the overlap at a place and radius, x, y, r."""
        across, down = (self.x - spot[0]) / spot[2], (self.y - spot[1]) / spot[2]
        return _overlap(self.mask, self.ideal.covers(across, down))

    def climb(self) -> tuple[str, float]:
        """Move in ever smaller steps; return the shape's name and its overlap."""
        moves = np.concatenate([np.eye(3), -np.eye(3)])
        reach = 0.12 * self.longest
        while reach > 1:
            spots = [self.spot + reach * move for move in moves]
            best, index = max((self.score(spot), i) for i, spot in enumerate(spots))
            if best > self.overlap and spots[index][2] > 4:
                self.overlap, self.spot = best, spots[index]
            else:
                reach /= 2
        return self.ideal.name, self.overlap
