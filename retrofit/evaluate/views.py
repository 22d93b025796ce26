"""How right the cameras, depth and points of many views are, dense and patched, against the truth.

Distances are in units of the scene: the truth is scaled so that the mean distance of all its points
from the first camera is 1, and predictions are brought to its scale by the median of their depth.
Points are compared in the axes of the first camera, the true one and the predicted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from retrofit.architectures.cameras import unproject_depth
from retrofit.evaluate.geometry import (
    absolute_relative_error,
    depth_scale,
    in_first_camera,
    pose_errors,
)
from retrofit.evaluate.truth import Change, SceneErrors, TrueScene, changes, summarise
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe
from retrofit.reconstruct.scene import to_scene
from retrofit.runtime.errors import InputError

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class ViewRow:
    """What one variant gave.

    Attributes:
        name: `dense`, or the label it was given.
        errors: Of every scene.
        metrics: By name, as in `TRUTH_METRICS`.
        keep_measured: Mean fraction of the query-key pairs that the patched sites computed.
        keep_by_site: The same for each site.
    """

    name: str
    errors: tuple[SceneErrors, ...]
    metrics: Mapping[str, float]
    keep_measured: float | None = None
    keep_by_site: Mapping[str, float] = field(default_factory=dict)

    def change(self, dense: ViewRow) -> dict[str, Change]:
        """Every metric against dense's."""
        return changes(dense.errors, self.errors)


def compare_views(
    model: nn.Module,
    variants: Mapping[str, Recipe],
    scenes: Sequence[TrueScene],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ViewRow]:
    """Run a network dense and patched on scenes with a known truth, without timing it.

    Args:
        model: A `VGGT` with camera and depth heads or a `Pi3`, not patched; left as it was.
        variants: Recipes by label.
        scenes: They run one by one.
        progress: Called as `progress(variant, done, total)`.

    Returns:
        The dense row, then one for each variant.

    Raises:
        InputError: If a scene has fewer than two views.
    """
    rows = []
    for done, (name, recipe) in enumerate([(DENSE, None), *variants.items()]):
        if progress is not None:
            progress(name, done, len(variants) + 1)
        rows.append(measure_variant(model, name, recipe, scenes))
    return rows


def measure_variant(
    model: nn.Module, name: str, recipe: Recipe | None, scenes: Sequence[TrueScene]
) -> ViewRow:
    """One row of `compare_views`; None is dense."""
    if recipe is None:
        errors = _run(model, scenes)
        return ViewRow(name=name, errors=errors, metrics=summarise(errors))
    with patch(model, recipe) as handle, handle.measuring():
        errors = _run(model, scenes)
        return ViewRow(
            name=name,
            errors=errors,
            metrics=summarise(errors),
            keep_measured=handle.keep_measured(),
            keep_by_site=keep_by_site(handle),
        )


def keep_by_site(handle: Patch) -> dict[str, float]:
    """Mean of the fractions that each site kept while `handle.measuring()` was entered."""
    kept = {} if handle.kept is None else handle.kept.kept
    return {path: sum(values) / len(values) for path, values in kept.items()}


@torch.no_grad()
def _run(model: nn.Module, scenes: Sequence[TrueScene]) -> tuple[SceneErrors, ...]:
    device = next(model.parameters()).device
    return tuple(measure_scene(model(scene.images[None].to(device)), scene) for scene in scenes)


def measure_scene(predictions: dict[str, Any], truth: TrueScene) -> SceneErrors:
    """Errors of what a network said of one scene.

    Args:
        predictions: Output of a `VGGT` or `Pi3`, batch 1.
        truth: The scene.

    Raises:
        InputError: If it has fewer than two views.
        UnsupportedError: If the network has no camera or no depth head.
        NonFiniteError: If a prediction is not finite.
    """
    if len(truth.images) < 2:
        raise InputError(f"views: expected two or more of each scene, got {len(truth.images)}.")
    found = to_scene(predictions, truth.images, [])
    rotation, translation = pose_errors(found.extrinsics, truth.extrinsics)
    abs_rel = points = math.nan
    if truth.depth is not None and truth.intrinsics is not None:
        scale = depth_scale(found.depth, truth.depth)
        abs_rel = absolute_relative_error(found.depth, truth.depth).item()
        true = unproject_depth(truth.depth, truth.extrinsics, truth.intrinsics)
        true = in_first_camera(true, truth.extrinsics)
        moved = in_first_camera(found.points, found.extrinsics) * scale
        unit = true.norm(dim=-1).nanmean()
        points = ((moved - true).norm(dim=-1).nanmean() / unit).item()
    return SceneErrors(abs_rel=abs_rel, points=points, rotation=rotation, translation=translation)
