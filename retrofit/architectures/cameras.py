"""Camera conventions: pose encodings, extrinsics, intrinsics, depth to world points.

Conventions used everywhere: OpenCV axes (x right, y down, z into the scene). Extrinsics
`[..., 3, 4]` map world to camera, `x_camera = R x_world + t`. Intrinsics `[..., 3, 3]` are in
pixels of the image given to the network, with the principal point at its centre (W / 2, H / 2) and
the first pixel at (0, 0). Quaternions are (x, y, z, w), the scalar last. Distances have no unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.runtime.errors import InputError


def decode_pose(pose_enc: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Turn VGGT's pose encoding into matrices.

    Args:
        pose_enc: `[..., 9]`: translation, quaternion, vertical and horizontal field of view (rad).
        image_size: Height and width of the images, pixels.

    Returns:
        Extrinsics `[..., 3, 4]` and intrinsics `[..., 3, 3]`.
    """
    height, width = image_size
    rotation = quaternion_to_matrix(pose_enc[..., 3:7])
    extrinsics = torch.cat([rotation, pose_enc[..., :3, None]], dim=-1)
    focal_y = height / 2 / torch.tan(pose_enc[..., 7] / 2)
    focal_x = width / 2 / torch.tan(pose_enc[..., 8] / 2)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = [focal_x, zero, one * (width / 2), zero, focal_y, one * (height / 2), zero, zero, one]
    return extrinsics, torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Turn matrices into VGGT's pose encoding, the inverse of `decode_pose`.

    Args:
        extrinsics: `[..., 3, 4]`, world to camera.
        intrinsics: `[..., 3, 3]`; the principal point is not encoded.
        image_size: Height and width of the images, pixels.

    Returns:
        `[..., 9]`; the quaternion has unit length and a scalar that is not negative.
    """
    height, width = image_size
    view_y = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    view_x = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(extrinsics[..., :3])
    views = torch.stack([view_y, view_x], dim=-1)
    return torch.cat([extrinsics[..., 3], quaternion, views], dim=-1)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices `[..., 3, 3]` of quaternions `[..., 4]` (x, y, z, w) of any length."""
    x, y, z, w = quaternion.unbind(-1)
    scale = 2 / (quaternion * quaternion).sum(-1)
    rows = [
        1 - scale * (y * y + z * z),
        scale * (x * y - z * w),
        scale * (x * z + y * w),
        scale * (x * y + z * w),
        1 - scale * (x * x + z * z),
        scale * (y * z - x * w),
        scale * (x * z - y * w),
        scale * (y * z + x * w),
        1 - scale * (x * x + y * y),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions `[..., 4]` (x, y, z, w) of rotation matrices `[..., 3, 3]`, w not negative.

    Of the four ways to divide, the one with the largest divisor is taken.
    """
    r = rotation.flatten(-2).unbind(-1)  # row-major entries
    trace = r[0] + r[4] + r[8]
    # Each row is one column of 4 q q^T: 4 q_i (x, y, z, w).
    rows = [
        [1 + r[0] - r[4] - r[8], r[1] + r[3], r[2] + r[6], r[7] - r[5]],
        [r[1] + r[3], 1 - r[0] + r[4] - r[8], r[5] + r[7], r[2] - r[6]],
        [r[2] + r[6], r[5] + r[7], 1 - r[0] - r[4] + r[8], r[3] - r[1]],
        [r[7] - r[5], r[2] - r[6], r[3] - r[1], 1 + trace],
    ]
    candidates = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)  # [..., 4, 4]
    largest = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    index = largest[..., None, None].expand(*largest.shape, 1, 4)
    chosen = candidates.gather(-2, index).squeeze(-2)
    chosen = torch.where(chosen[..., 3:] < 0, -chosen, chosen)
    return chosen / chosen.norm(dim=-1, keepdim=True)


def invert_extrinsics(extrinsics: Tensor) -> Tensor:
    """Camera to world `[..., 3, 4]` from world to camera `[..., 3, 4]`, or the other way."""
    inverse = extrinsics[..., :3].transpose(-1, -2)
    return torch.cat([inverse, -inverse @ extrinsics[..., 3:]], dim=-1)


def unproject_depth(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:
    """World points of a depth map: `R^T (z K^-1 (u, v, 1) - t)` at integer pixels (u, v).

    Args:
        depth: Distance along the camera's z axis, `[..., H, W]`.
        extrinsics: World to camera, `[..., 3, 4]`.
        intrinsics: `[..., 3, 3]`.

    Returns:
        `[..., H, W, 3]`.

    Raises:
        InputError: If the leading axes differ.
    """
    if not depth.shape[:-2] == extrinsics.shape[:-2] == intrinsics.shape[:-2]:
        raise InputError(
            "unproject_depth: expected the same leading axes, got depth"
            f" {list(depth.shape)}, extrinsics {list(extrinsics.shape)}, intrinsics"
            f" {list(intrinsics.shape)}. Leave out the channel axis of the depth."
        )
    height, width = depth.shape[-2:]
    k = intrinsics[..., None, None, :, :]  # [..., 1, 1, 3, 3]
    u = torch.arange(width, device=depth.device, dtype=depth.dtype)
    v = torch.arange(height, device=depth.device, dtype=depth.dtype)[:, None]
    x = (u - k[..., 0, 2]) / k[..., 0, 0] * depth
    y = (v - k[..., 1, 2]) / k[..., 1, 1] * depth
    return camera_to_world(torch.stack([x, y, depth], dim=-1), extrinsics)


def camera_to_world(points: Tensor, extrinsics: Tensor) -> Tensor:
    """Move points `[..., H, W, 3]` from the camera's frame by world-to-camera `[..., 3, 4]`."""
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    shifted = points - translation[..., None, None, :]
    return torch.einsum("...hwi,...ij->...hwj", shifted, rotation)
