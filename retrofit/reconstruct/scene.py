"""What a reconstruction holds: cameras, depth, confidence and points, whatever network made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrofit.architectures.cameras import (
    camera_to_world,
    decode_pose,
    invert_extrinsics,
    unproject_depth,
)
from retrofit.architectures.images import ImageFit
from retrofit.runtime.errors import NonFiniteError, UnsupportedError
from retrofit.runtime.finite import is_finite


@dataclass(frozen=True, kw_only=True)
class Scene:
    """N views reconstructed together, on the CPU in float32.

    Conventions are those of `retrofit.architectures.cameras`: OpenCV axes, world to camera, the
    network's pixel in column u lies at u. Distances have no unit.

    Attributes:
        images: As the network saw them, `[N, 3, H, W]` in [0, 1].
        fits: How each photo was fitted.
        extrinsics: World to camera, `[N, 3, 4]`.
        intrinsics: Of the network's images, `[N, 3, 3]`.
        depth: Along the camera's z axis, `[N, H, W]`.
        confidence: Positive, larger is surer, `[N, H, W]`.
        points: In the world, `[N, H, W, 3]`.
    """

    images: Tensor
    fits: tuple[ImageFit, ...]
    extrinsics: Tensor
    intrinsics: Tensor
    depth: Tensor
    confidence: Tensor
    points: Tensor

    @property
    def inside(self) -> Tensor:
        """True where a pixel shows a photo, not white or what is transparent, `[N, H, W]`."""
        height, width = self.images.shape[-2:]
        return torch.stack([fit.shown(height, width) for fit in self.fits])

    def photo_intrinsics(self) -> Tensor:
        """Intrinsics of the upright photos, `[N, 3, 3]`."""
        pairs = zip(self.fits, self.intrinsics, strict=True)
        return torch.stack([fit.original_intrinsics(matrix) for fit, matrix in pairs])


def to_scene(predictions: dict[str, Any], images: Tensor, fits: list[ImageFit]) -> Scene:
    """Bring a network's output, of one scene, into one form.

    VGGT's points are its depth seen through its cameras, which its authors found more exact than
    its point head (https://arxiv.org/abs/2503.11651, section 4). Pi3 says no focal lengths: they
    are fitted to its local points.

    Args:
        predictions: Of a `VGGT` or a `Pi3`, or of the original packages' classes.
        images: `[N, 3, H, W]`, what it was given.
        fits: How the photos were fitted.

    Raises:
        UnsupportedError: If the network has no camera or no depth head.
        NonFiniteError: If a result is not finite.
    """
    found = {
        name: value.detach()[0].float().cpu()
        for name, value in predictions.items()
        if isinstance(value, Tensor)
    }
    parts = _from_pi3(found) if "local_points" in found else _from_vggt(found, images)
    for name, value in parts.items():
        if not is_finite(value):
            raise NonFiniteError(
                f"reconstruct: NaN or infinity in {name}. Use --dtype float32 or bfloat16, and "
                "check that the checkpoint is a trained one."
            )
    return Scene(images=images.float().cpu(), fits=tuple(fits), **parts)


def _from_vggt(found: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    if "pose_enc" not in found or "depth" not in found:
        raise UnsupportedError(
            "reconstruct: expected a network with a camera and a depth head, got one that gives"
            f" {', '.join(sorted(found))}. Give a checkpoint that has both."
        )
    size = (images.shape[-2], images.shape[-1])
    extrinsics, intrinsics = decode_pose(found["pose_enc"], size)
    depth = found["depth"][..., 0]
    return {
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
        "depth": depth,
        "confidence": found["depth_conf"],
        "points": unproject_depth(depth, extrinsics, intrinsics),
    }


def _from_pi3(found: dict[str, Tensor]) -> dict[str, Tensor]:
    local, confidence = found["local_points"], found["conf"][..., 0].sigmoid()
    extrinsics = invert_extrinsics(found["camera_poses"][:, :3])
    return {
        "extrinsics": extrinsics,
        "intrinsics": fit_intrinsics(local, confidence),
        "depth": local[..., 2],
        "confidence": confidence,
        "points": camera_to_world(local, extrinsics),
    }


def fit_intrinsics(local_points: Tensor, weights: Tensor) -> Tensor:
    """Focal lengths with which every pixel sees its point, the principal point in the middle.

    Least squares of `u - W / 2 = fx X / Z` over all pixels, likewise for y.

    Args:
        local_points: Points in the camera's axes, `[N, H, W, 3]`, Z above 0.
        weights: How much a pixel counts, `[N, H, W]`.

    Returns:
        `[N, 3, 3]`, pixels.
    """
    count, height, width = weights.shape
    pixels = (torch.arange(width) - width / 2, (torch.arange(height) - height / 2)[:, None])
    intrinsics = torch.eye(3).repeat(count, 1, 1)
    for axis, pixel in enumerate(pixels):
        slope = local_points[..., axis] / local_points[..., 2]
        product = (weights * slope * pixel).sum((1, 2))
        intrinsics[:, axis, axis] = product / (weights * slope.square()).sum((1, 2))
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width / 2, height / 2
    return intrinsics
