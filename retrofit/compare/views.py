"""How right the cameras, depth and points of many views are, dense and patched, against the truth.

Distances are in units of the scene: the truth is scaled so that the mean distance of all its points
from the first camera is 1, and predictions are brought to its scale by the median of their depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.architectures.cameras import decode_pose, unproject_depth
from retrofit.errors import InputError
from retrofit.patching import patch
from retrofit.recipe import Recipe

DENSE = "dense"
ANGLES = (5, 15)  # degrees


@dataclass(frozen=True, kw_only=True)
class TrueViews:
    """Views of S scenes whose cameras and depth are known.

    Attributes:
        images: `[S, N, 3, H, W]` in [0, 1].
        depth: Along the camera's z axis, `[S, N, H, W]`.
        extrinsics: World to camera, `[S, N, 3, 4]`.
        intrinsics: `[S, N, 3, 3]`.
    """

    images: Tensor
    depth: Tensor
    extrinsics: Tensor
    intrinsics: Tensor


@dataclass(frozen=True, kw_only=True)
class ViewRow:
    """What one variant gave.

    Attributes:
        name: `dense`, or the label it was given.
        metrics: By name: `abs_rel`, `rotation` and `translation` (median error of all pairs of
            views, degrees), `rra@5`, `rra@15`, `rta@5`, `rta@15` (fractions of the pairs below so
            many degrees), `points` (mean distance from the true point).
        keep_measured: Mean fraction of the query-key pairs that the patched sites computed.
        keep_by_site: The same for each site.
    """

    name: str
    metrics: Mapping[str, float]
    keep_measured: float | None = None
    keep_by_site: Mapping[str, float] = field(default_factory=dict)

    def change(self, dense: ViewRow) -> dict[str, float]:
        """By how much each error is larger than dense's, relative; fractions by what they lost."""
        return {
            name: (dense.metrics[name] - value if name[:3] in ("rra", "rta") else value - base)
            / (base or 1.0)
            for name, value in self.metrics.items()
            for base in [dense.metrics[name]]
        }


def compare_views(
    model: nn.Module,
    variants: Mapping[str, Recipe],
    truth: TrueViews,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ViewRow]:
    """Run a VGGT dense and patched on scenes with a known truth.

    Args:
        model: A `VGGT` with camera and depth heads, not patched; it is left as it was.
        variants: Recipes by label.
        truth: The scenes; they run one by one.
        progress: Called as `progress(variant, done, total)`.

    Returns:
        The dense row, then one for each variant.

    Raises:
        InputError: If a scene has fewer than two views.
    """
    if truth.images.shape[1] < 2:
        raise InputError(
            f"views: expected two or more of each scene, got {truth.images.shape[1]}. Take more."
        )
    rows = [ViewRow(name=DENSE, metrics=_measure(model, truth))]
    for done, (name, recipe) in enumerate(variants.items()):
        if progress is not None:
            progress(name, done, len(variants))
        with patch(model, recipe) as handle, handle.measuring() as sites:
            metrics = _measure(model, truth)
            kept = {
                path: sum(site.counts.keep) / len(site.counts.keep)
                for path, site in sites.items()
                if site.counts.keep
            }
            rows.append(
                ViewRow(
                    name=name,
                    metrics=metrics,
                    keep_measured=handle.keep_measured(),
                    keep_by_site=kept,
                )
            )
    return rows


@torch.no_grad()
def _measure(model: nn.Module, truth: TrueViews) -> dict[str, float]:
    """Every metric over all scenes."""
    size = (truth.images.shape[-2], truth.images.shape[-1])
    poses, depths = [], []
    for images in truth.images:
        predictions: dict[str, Any] = model(images[None])
        poses.append(predictions["pose_enc"][0].float())
        depths.append(predictions["depth"][0, ..., 0].float())
    extrinsics, intrinsics = decode_pose(torch.stack(poses), size)
    depth = torch.stack(depths)
    rotation, translation = pose_errors(extrinsics, truth.extrinsics)
    scale = depth_scale(depth, truth.depth)
    found = {
        "abs_rel": absolute_relative_error(depth, truth.depth).mean().item(),
        "points": point_errors(depth, extrinsics, intrinsics, truth, scale).mean().item(),
        "rotation": rotation.median().item(),
        "translation": translation.median().item(),
    }
    for name, errors in (("rra", rotation), ("rta", translation)):
        found |= {f"{name}@{limit}": (errors < limit).float().mean().item() for limit in ANGLES}
    return found


def pose_errors(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of the relative pose of all pairs of views of a scene, degrees.

    Args:
        predicted: Extrinsics `[S, N, 3, 4]`.
        true: The same shape.

    Returns:
        Of the rotation, and of the direction of the translation, `[S, N (N - 1) / 2]` each.
    """
    (rotation, shift), (true_rotation, true_shift) = map(_relative, (predicted, true))
    cosine = nn.functional.cosine_similarity(shift, true_shift, dim=-1).clamp(-1, 1)
    return angle_of(rotation @ true_rotation.mT), torch.rad2deg(cosine.acos())


def true_rotations(extrinsics: Tensor) -> Tensor:
    """Angles between all pairs of views, degrees, `[S, N (N - 1) / 2]`."""
    return angle_of(_relative(extrinsics)[0])


def _relative(extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """From the first view of a pair to the second: `[S, P, 3, 3]` and `[S, P, 3]`."""
    count = extrinsics.shape[1]
    first, second = torch.triu_indices(count, count, 1)
    start, end = extrinsics[:, first], extrinsics[:, second]
    rotation = end[..., :3] @ start[..., :3].mT
    shift = end[..., 3] - (rotation @ start[..., 3:])[..., 0]
    return rotation, shift


def angle_of(rotation: Tensor) -> Tensor:
    """Angle of rotation matrices `[..., 3, 3]`, degrees."""
    trace = rotation.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos()).float()


def depth_scale(predicted: Tensor, true: Tensor) -> Tensor:
    """Factor that brings a scene's predicted depth to the true median, `[S]`."""
    return true.flatten(1).median(dim=1).values / predicted.flatten(1).median(dim=1).values


def absolute_relative_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean of `|predicted - true| / true` over a scene's pixels, medians matched, `[S]`.

    Args:
        predicted: Depth `[S, N, H, W]`.
        true: The same shape.
    """
    scaled = predicted * depth_scale(predicted, true)[:, None, None, None]
    return ((scaled - true).abs() / true).flatten(1).mean(dim=1)


def point_errors(
    depth: Tensor, extrinsics: Tensor, intrinsics: Tensor, truth: TrueViews, scale: Tensor
) -> Tensor:
    """Mean distance between predicted and true world points of a scene, `[S]`."""
    predicted = unproject_depth(depth, extrinsics, intrinsics) * scale[:, None, None, None, None]
    true = unproject_depth(truth.depth, truth.extrinsics, truth.intrinsics)
    return (predicted - true).norm(dim=-1).flatten(1).mean(dim=1)
