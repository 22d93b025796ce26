"""Camera conventions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retrofit.architectures.cameras import (
    camera_to_world,
    decode_pose,
    encode_pose,
    invert_extrinsics,
    matrix_to_quaternion,
    quaternion_to_matrix,
    unproject_depth,
)
from retrofit.runtime.errors import InputError


def random_poses(count: int, size: tuple[int, int] = (30, 50)) -> tuple[Tensor, Tensor]:
    quaternions = torch.randn(count, 4, dtype=torch.float64)
    translations = torch.randn(count, 3, 1, dtype=torch.float64)
    extrinsics = torch.cat([quaternion_to_matrix(quaternions), translations], dim=-1)
    focal = 20 + 30 * torch.rand(count, 2, dtype=torch.float64)
    intrinsics = torch.zeros(count, 3, 3, dtype=torch.float64)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1], intrinsics[:, 2, 2] = focal[:, 0], focal[:, 1], 1
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = size[1] / 2, size[0] / 2
    return extrinsics, intrinsics


def test_a_quarter_turn_about_z_takes_x_to_y() -> None:
    half = math.sqrt(0.5)
    rotation = quaternion_to_matrix(torch.tensor([0.0, 0.0, half, half]))
    assert torch.allclose(
        rotation @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6
    )


def test_quaternions_of_any_length_give_rotations() -> None:
    quaternions = 7 * torch.randn(200, 4, dtype=torch.float64)
    rotation = quaternion_to_matrix(quaternions)
    identity = torch.eye(3, dtype=torch.float64).expand(200, 3, 3)
    assert torch.allclose(rotation @ rotation.transpose(-1, -2), identity, atol=1e-12)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(200, dtype=torch.float64))


def test_matrices_give_back_their_quaternions() -> None:
    quaternions = torch.randn(500, 4, dtype=torch.float64)
    axes = torch.cat([torch.eye(4, dtype=torch.float64), 1e-9 + torch.eye(4, dtype=torch.float64)])
    quaternions = torch.cat([quaternions, axes])
    quaternions /= quaternions.norm(dim=-1, keepdim=True)
    back = matrix_to_quaternion(quaternion_to_matrix(quaternions))
    assert (back[:, 3] >= 0).all()
    # q and -q are the same rotation; w = 0 leaves the sign open.
    same = (back * quaternions).sum(-1).abs()
    assert torch.allclose(same, torch.ones_like(same), atol=1e-12)


def test_encoding_and_decoding_are_inverse() -> None:
    extrinsics, intrinsics = random_poses(40)
    pose = encode_pose(extrinsics, intrinsics, (30, 50))
    assert pose.shape == (40, 9)
    back_extrinsics, back_intrinsics = decode_pose(pose, (30, 50))
    assert torch.allclose(back_extrinsics, extrinsics, atol=1e-12)
    assert torch.allclose(back_intrinsics, intrinsics, atol=1e-9)


def test_field_of_view_is_vertical_then_horizontal() -> None:
    pose = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, math.pi / 2, 2 * math.atan(0.5)])
    _, intrinsics = decode_pose(pose, (40, 60))
    expected = torch.tensor([[60.0, 0, 30], [0, 20, 20], [0, 0, 1]])
    assert torch.allclose(intrinsics, expected, atol=1e-4)


def test_inverse_extrinsics_undo_them() -> None:
    extrinsics, _ = random_poses(9)
    points = torch.randn(9, 3, 1, dtype=torch.float64)
    moved = extrinsics[..., :3] @ points + extrinsics[..., 3:]
    inverse = invert_extrinsics(extrinsics)
    assert torch.allclose(inverse[..., :3] @ moved + inverse[..., 3:], points, atol=1e-12)


def test_unprojected_depth_projects_back_to_its_pixels() -> None:
    extrinsics, intrinsics = random_poses(6)
    extrinsics, intrinsics = extrinsics.view(2, 3, 3, 4), intrinsics.view(2, 3, 3, 3)
    depth = 0.5 + torch.rand(2, 3, 30, 50, dtype=torch.float64)
    points = unproject_depth(depth, extrinsics, intrinsics)
    camera = torch.einsum("bnij,bnhwj->bnhwi", extrinsics[..., :3], points)
    camera += extrinsics[..., None, None, :, 3]
    pixels = torch.einsum("bnij,bnhwj->bnhwi", intrinsics, camera)
    assert torch.allclose(camera[..., 2], depth, atol=1e-12)
    u, v = torch.meshgrid(torch.arange(50.0), torch.arange(30.0), indexing="xy")
    assert torch.allclose(pixels[..., 0] / depth, u.double().expand_as(depth), atol=1e-9)
    assert torch.allclose(pixels[..., 1] / depth, v.double().expand_as(depth), atol=1e-9)


def test_camera_to_world_agrees_with_the_inverse() -> None:
    extrinsics, _ = random_poses(4)
    points = torch.randn(4, 5, 6, 3, dtype=torch.float64)
    inverse = invert_extrinsics(extrinsics)
    expected = torch.einsum("nij,nhwj->nhwi", inverse[..., :3], points)
    expected += inverse[:, None, None, :, 3]
    assert torch.allclose(camera_to_world(points, extrinsics), expected, atol=1e-12)


def test_depth_with_a_channel_axis_is_refused() -> None:
    extrinsics, intrinsics = random_poses(3)
    with pytest.raises(InputError, match="Leave out the channel axis"):
        unproject_depth(torch.ones(3, 4, 5, 1), extrinsics, intrinsics)
