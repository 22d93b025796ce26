"""How right the cameras, depth and points of many views are, dense and patched, against the truth.

Distances are in units of the scene: the truth is scaled so that the mean distance of all its points
from the first camera is 1, and predictions are brought to its scale by the median of their depth.
Points are compared in the axes of the first camera, the true one and the predicted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from retrofit.architectures.cameras import unproject_depth
from retrofit.errors import InputError
from retrofit.patching import Patch, patch
from retrofit.recipe import Recipe
from retrofit.reconstruct.scene import to_scene

DENSE = "dense"
ANGLES = (5, 15)  # degrees
RESAMPLES = 200  # of the scenes, for how sure a change is
SAME_PLACE = 1e-6  # of the farthest camera: closer ones have no direction between them


@dataclass(frozen=True, kw_only=True)
class TruthMetric:
    """A number of many scenes against their truth.

    Attributes:
        name: Key in JSON, heading in tables.
        meaning: One line for people.
        better: Whether less or more of it is closer to the truth.
        floor: A dense number up to here is as good as none: what is lost or gained against it is
            said in the metric's own unit, not relative to it.
    """

    name: str
    meaning: str
    better: Literal["lower", "higher"]
    floor: float


TRUTH_METRICS = (
    TruthMetric(
        name="abs_rel", meaning="mean relative error of the depth", better="lower", floor=1e-3
    ),
    TruthMetric(
        name="points", meaning="mean distance from the true point", better="lower", floor=1e-3
    ),
    TruthMetric(
        name="rotation",
        meaning="rotation between two views, median error in degrees",
        better="lower",
        floor=0.1,
    ),
    TruthMetric(
        name="translation",
        meaning="direction from one view to another, median error in degrees",
        better="lower",
        floor=0.1,
    ),
    *(
        TruthMetric(
            name=f"{short}@{limit}",
            meaning=f"fraction of the pairs whose {what} is right within {limit} degrees",
            better="higher",
            floor=0.05,
        )
        for short, what in (("rra", "rotation"), ("rta", "translation"))
        for limit in ANGLES
    ),
)


@dataclass(frozen=True, kw_only=True)
class TrueScene:
    """N views of a scene whose cameras, and perhaps depth, are known.

    Attributes:
        images: As the network takes them, `[N, 3, H, W]` in [0, 1].
        extrinsics: World to camera, `[N, 3, 4]`.
        intrinsics: Of these images, `[N, 3, 3]`; None where depth is.
        depth: Along the camera's z axis, `[N, H, W]`, NaN where it is not known; None if nowhere.
    """

    images: Tensor
    extrinsics: Tensor
    intrinsics: Tensor | None = None
    depth: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SceneErrors:
    """Errors of one scene; NaN where the truth says nothing.

    Attributes:
        abs_rel: Mean of `|predicted - true| / true` over the pixels.
        points: Mean distance from the true point.
        rotation: Of every pair of views, degrees, `[N (N - 1) / 2]`.
        translation: Of its direction, degrees, `[N (N - 1) / 2]`.
    """

    abs_rel: float
    points: float
    rotation: Tensor
    translation: Tensor


@dataclass(frozen=True, kw_only=True)
class Change:
    """By how much an error is larger than dense's, or a fraction smaller.

    Attributes:
        value: Over all scenes; 0.02 is 2% worse, or worse by 0.02.
        low: 5th percentile over resamplings of the scenes, the same ones for dense.
        high: 95th percentile.
        relative: Whether it is a fraction of dense's number; where that is next to nothing (see
            `TruthMetric.floor`), it is the difference itself.
    """

    value: float
    low: float
    high: float
    relative: bool = True


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
    kept = {path: site.counts.keep for path, site in handle.sites.items()}
    return {path: sum(values) / len(values) for path, values in kept.items() if values}


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


def summarise(errors: Sequence[SceneErrors]) -> dict[str, float]:
    """Every metric over all scenes: means over scenes, medians and fractions over all pairs.

    What no scene's truth tells is left out.
    """
    found = _summarise(_stack(errors), torch.arange(len(errors))[None])
    return {name: value.item() for name, value in found.items() if not value.isnan()}


def changes(
    dense: Sequence[SceneErrors], patched: Sequence[SceneErrors], *, seed: int = 0
) -> dict[str, Change]:
    """Every metric of a variant against dense's on the same scenes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(dense), (RESAMPLES, len(dense)), generator=generator)
    index = torch.cat([torch.arange(len(dense))[None], drawn])
    before, after = _summarise(_stack(dense), index), _summarise(_stack(patched), index)
    made = {}
    for metric in TRUTH_METRICS:
        old, new = before[metric.name], after[metric.name]
        if old[0].isnan():
            continue
        loss = old - new if metric.better == "higher" else new - old
        relative = old[0].item() > metric.floor
        change = loss / old.clamp_min(metric.floor) if relative else loss
        low, high = torch.nanquantile(change[1:], torch.tensor([0.05, 0.95])).tolist()
        made[metric.name] = Change(value=change[0].item(), low=low, high=high, relative=relative)
    return made


def _stack(errors: Sequence[SceneErrors]) -> dict[str, Tensor]:
    """`[S, P]` for each kind of error, shorter scenes filled up with NaN."""
    return {
        "abs_rel": torch.tensor([[scene.abs_rel] for scene in errors]),
        "points": torch.tensor([[scene.points] for scene in errors]),
        "rotation": _pad([scene.rotation for scene in errors]),
        "translation": _pad([scene.translation for scene in errors]),
    }


def _pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=math.nan)


def _summarise(stacked: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Metrics of some choices of scenes `[R, S]`, `[R]` each."""
    chosen = {name: values[index].flatten(1) for name, values in stacked.items()}
    found = {name: chosen[name].nanmean(1) for name in ("abs_rel", "points")}
    found |= {name: chosen[name].nanmedian(1).values for name in ("rotation", "translation")}
    for short, name in (("rra", "rotation"), ("rta", "translation")):
        known = ~chosen[name].isnan()
        for limit in ANGLES:
            found[f"{short}@{limit}"] = (chosen[name] < limit).sum(1) / known.sum(1)
    return found


def pose_errors(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of the relative pose of all pairs of views of a scene, degrees.

    Args:
        predicted: Extrinsics `[..., N, 3, 4]`.
        true: The same shape.

    Returns:
        Of the rotation, and of the direction of the translation, `[..., N (N - 1) / 2]` each; NaN
        for the direction between cameras that stand in one place.
    """
    (rotation, shift), (true_rotation, true_shift) = map(_relative, (predicted, true))
    cosine = nn.functional.cosine_similarity(shift, true_shift, dim=-1).clamp(-1, 1)
    length = true_shift.norm(dim=-1)
    stands = length <= SAME_PLACE * length.amax(-1, keepdim=True)
    direction = torch.rad2deg(cosine.acos()).masked_fill(stands, math.nan)
    return angle_of(rotation @ true_rotation.mT), direction


def true_rotations(extrinsics: Tensor) -> Tensor:
    """Angles between all pairs of views, degrees, `[..., N (N - 1) / 2]`."""
    return angle_of(_relative(extrinsics)[0])


def _relative(extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """From the first view of a pair to the second: `[..., P, 3, 3]` and `[..., P, 3]`."""
    count = extrinsics.shape[-3]
    first, second = torch.triu_indices(count, count, 1)
    start, end = extrinsics[..., first, :, :], extrinsics[..., second, :, :]
    rotation = end[..., :3] @ start[..., :3].mT
    shift = end[..., 3] - (rotation @ start[..., 3:])[..., 0]
    return rotation, shift


def angle_of(rotation: Tensor) -> Tensor:
    """Angle of rotation matrices `[..., 3, 3]`, degrees."""
    trace = rotation.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos()).float()


def depth_scale(predicted: Tensor, true: Tensor) -> Tensor:
    """Factor that brings a scene's predicted depth to the true median, `[...]`.

    Args:
        predicted: Depth `[..., N, H, W]`.
        true: The same shape, NaN where it is not known.
    """
    known = predicted.masked_fill(true.isnan(), math.nan)
    middle, wanted = (x.flatten(-3).nanmedian(dim=-1).values for x in (known, true))
    return wanted / middle


def absolute_relative_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean of `|predicted - true| / true` over a scene's pixels, medians matched, `[...]`.

    Args:
        predicted: Depth `[..., N, H, W]`.
        true: The same shape, NaN where it is not known.
    """
    scaled = predicted * depth_scale(predicted, true)[..., None, None, None]
    return ((scaled - true).abs() / true).flatten(-3).nanmean(dim=-1)


def in_first_camera(points: Tensor, extrinsics: Tensor) -> Tensor:
    """World points `[N, H, W, 3]` in the axes of the first of the cameras `[N, 3, 4]`."""
    return points @ extrinsics[0, :, :3].mT + extrinsics[0, :, 3]
