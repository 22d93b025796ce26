"""Errors of poses and depth: what no metric's name or average is needed for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SAME_PLACE = 1e-6  # of the farthest camera: closer ones have no direction between them


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
