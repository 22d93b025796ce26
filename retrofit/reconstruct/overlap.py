"""How much the views of a scene show the same place, by its own cameras, depth and colours."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from retrofit.reconstruct.scene import Scene

logger = logging.getLogger(__name__)
MOST_PIXELS = 1024  # of a view
FEWEST_PIXELS = 20  # that agree, before their colours say anything
SAME_DEPTH = 0.1  # largest difference, as a logarithm
LOW = 0.1  # measured on `rooms`: docs/reconstruct.md
FEWEST_VIEWS = 3  # of two, one place and two look too much alike


def warn_of_low_overlap(scene: Scene) -> None:
    """Say so where a scene's overlap is what photos of different places have."""
    if len(scene.fits) < FEWEST_VIEWS:
        return
    overlap = measure_overlap(scene)
    if overlap < LOW:
        logger.warning(
            "the views share little (%.2f, one place has %.1f or more): do they show one place? "
            "Look at preview.png.",
            overlap,
            LOW,
        )


def measure_overlap(scene: Scene) -> float:
    """The fraction of a view that its best partner shows too, averaged over the views.

    A pixel counts whose point lies in the other view at the depth that is seen there; all of them
    count less where colours agree no better than those of pixels paired at random.
    """
    inside = scene.inside
    best = []
    for index in range(len(scene.fits)):
        row, column = inside[index].nonzero(as_tuple=True)
        step = max(1, len(row) // MOST_PIXELS)
        row, column = row[::step], column[::step]
        points, colours = scene.points[index, row, column], scene.images[index][:, row, column]
        others = [other for other in range(len(scene.fits)) if other != index]
        best.append(max(_shared(scene, inside, other, points, colours) for other in others))
    return sum(best) / len(best)


def _shared(scene: Scene, inside: Tensor, other: int, points: Tensor, colours: Tensor) -> float:
    """Fraction of points `[P, 3]` with colours `[3, P]` that another view shows."""
    pose, (height, width) = scene.extrinsics[other], scene.images.shape[-2:]
    local = points @ pose[:, :3].T + pose[:, 3]
    depth = local[:, 2]
    at = (local @ scene.intrinsics[other].T)[:, :2] / depth[:, None].clamp_min(1e-6)
    column, row = at.round().clamp(-1, max(height, width)).long().unbind(-1)
    seen = (depth > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    there = scene.depth[other, row, column]
    seen &= inside[other, row, column] & ((depth / there).log().abs() < SAME_DEPTH)
    if seen.sum() < FEWEST_PIXELS:
        return 0.0
    mine, theirs = colours[:, seen], scene.images[other][:, row[seen], column[seen]]
    mixed = torch.randperm(theirs.shape[1], generator=torch.Generator().manual_seed(0))
    matched, by_chance = ((mine - x).abs().mean() for x in (theirs, theirs[:, mixed]))
    likeness = 1 - float(matched / by_chance.clamp_min(1e-6))
    return float(seen.float().mean()) * max(likeness, 0.0)
