"""Errors of cameras, depth and points against a known truth."""

from __future__ import annotations

import math

import pytest
import torch

from retrofit.architectures.cameras import quaternion_to_matrix
from retrofit.compare.views import (
    TrueViews,
    ViewRow,
    absolute_relative_error,
    angle_of,
    compare_views,
    point_errors,
    pose_errors,
    true_rotations,
)
from retrofit.errors import InputError
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.recipe import Recipe
from tests.architectures.small_networks import small_vggt


def turned(degrees: float) -> torch.Tensor:
    """A rotation about the vertical."""
    half = math.radians(degrees) / 2
    return quaternion_to_matrix(torch.tensor([0.0, math.sin(half), 0.0, math.cos(half)]))


def cameras(*angles: float, shift: float = 1.0) -> torch.Tensor:
    """World-to-camera matrices `[1, N, 3, 4]`, each turned and moved on."""
    poses = [
        torch.cat([turned(a), torch.tensor([[shift * i], [0.0], [0.5 * i]])], -1)
        for i, a in enumerate(angles)
    ]
    return torch.stack(poses)[None]


def random_truth(views: int = 3) -> TrueViews:
    intrinsics = torch.tensor([[50.0, 0, 28], [0, 50, 28], [0, 0, 1]]).expand(2, views, 3, 3)
    return TrueViews(
        images=torch.rand(2, views, 3, 56, 56),
        depth=1 + torch.rand(2, views, 56, 56),
        extrinsics=cameras(*[10.0 * i for i in range(views)]).expand(2, -1, -1, -1),
        intrinsics=intrinsics,
    )


def test_rotations_are_compared_between_all_pairs_of_views() -> None:
    true, predicted = cameras(0, 30, 90), cameras(0, 33, 85)
    rotation, _ = pose_errors(predicted, true)
    assert torch.allclose(true_rotations(true), torch.tensor([[30.0, 90, 60]]), atol=1e-2)
    assert torch.allclose(rotation, torch.tensor([[3.0, 5, 8]]), atol=1e-2)


def test_a_common_turn_of_the_world_is_no_error() -> None:
    true = cameras(0, 30, 90)
    world = torch.cat([turned(57), torch.tensor([[1.0], [2], [3]])], -1)
    moved = torch.cat(
        [true[..., :3] @ world[:, :3], true[..., :3] @ world[:, 3:] + true[..., 3:]], -1
    )
    rotation, translation = pose_errors(moved, true)
    assert rotation.max() < 0.05
    assert translation.max() < 0.05


def test_translations_are_compared_by_direction_alone() -> None:
    true = cameras(0, 0, 0)
    longer = torch.cat([true[..., :3], 3 * true[..., 3:]], -1)
    assert pose_errors(longer, true)[1].max() < 0.05
    aside = true.clone()
    aside[:, 1, :, 3] = torch.tensor([-0.5, 0.0, 1.0])  # at right angles to (1, 0, 0.5)
    assert pose_errors(aside, true)[1][0, 0] == pytest.approx(90, abs=0.1)


def test_depth_is_compared_once_its_median_is_matched() -> None:
    true = torch.linspace(1, 2, 3 * 2 * 9 * 9)[torch.randperm(486)].view(3, 2, 9, 9)
    assert absolute_relative_error(7 * true, true).max() < 1e-6
    wrong = true.clone()
    place = true[0].argmax()
    wrong[0].view(-1)[place] *= 2  # the largest, so the median stays
    expected = torch.tensor([1 / 162, 0, 0])
    assert torch.allclose(absolute_relative_error(wrong, true), expected, atol=1e-6)


def test_points_of_true_cameras_and_depth_have_no_error() -> None:
    truth = random_truth()
    ones = torch.ones(2)
    found = point_errors(truth.depth, truth.extrinsics, truth.intrinsics, truth, ones)
    assert found.max() < 1e-5
    further = point_errors(truth.depth * 1.1, truth.extrinsics, truth.intrinsics, truth, ones)
    assert further.min() > 0.1


def test_angles_of_no_and_of_half_a_turn() -> None:
    found = angle_of(torch.stack([torch.eye(3), turned(180)]))
    assert torch.allclose(found, torch.tensor([0.0, 180.0]), atol=0.1)


def test_a_worse_number_is_a_positive_change_whichever_way_it_counts() -> None:
    dense = ViewRow(name="dense", metrics={"points": 0.2, "rra@5": 0.8})
    worse = ViewRow(name="x", metrics={"points": 0.3, "rra@5": 0.6})
    assert worse.change(dense) == pytest.approx({"points": 0.5, "rra@5": 0.25})


def test_rows_hold_every_number_and_the_model_is_left_dense() -> None:
    model, truth = small_vggt(), random_truth()
    recipe = Recipe(method=BlockSparseConfig(keep=0.25, block_size=(4, 4)))
    dense, sparse = compare_views(model, {"quarter": recipe}, truth)
    names = {"abs_rel", "points", "rotation", "translation"}
    names |= {f"{kind}@{limit}" for kind in ("rra", "rta") for limit in (5, 15)}
    assert dense.metrics.keys() == sparse.metrics.keys() == names
    assert len(sparse.keep_by_site) == 6
    assert 0.25 < (sparse.keep_measured or 0) < 0.8
    (again,) = compare_views(model, {}, truth)
    assert again.metrics == pytest.approx(dense.metrics, nan_ok=True)


def test_one_view_is_refused() -> None:
    with pytest.raises(InputError, match="two or more"):
        compare_views(small_vggt(), {}, random_truth(views=1))
