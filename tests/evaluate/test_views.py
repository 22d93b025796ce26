"""Errors of cameras, depth and points against a known truth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from retrofit.architectures.cameras import encode_pose, quaternion_to_matrix
from retrofit.evaluate.geometry import (
    absolute_relative_error,
    angle_of,
    pose_errors,
    true_rotations,
)
from retrofit.evaluate.truth import Change, SceneErrors, TrueScene, changes, summarise
from retrofit.evaluate.views import compare_views, measure_scene
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import InputError
from tests.architectures.small_networks import small_pi3, small_vggt
from tests.reconstruct.conftest import seeing_vggt


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


def random_truth(views: int = 3, *, seed: int = 0) -> TrueScene:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.tensor([[50.0, 0, 28], [0, 50, 28], [0, 0, 1]])
    return TrueScene(
        images=torch.rand(views, 3, 56, 56, generator=generator),
        depth=1 + torch.rand(views, 56, 56, generator=generator),
        extrinsics=cameras(*[10.0 * i for i in range(views)])[0],
        intrinsics=matrix.expand(views, 3, 3),
    )


def predict(truth: TrueScene, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """What a network that knows the truth would say, in other units."""
    moved = truth.extrinsics.clone()
    moved[..., 3] *= scale
    pose = encode_pose(moved, truth.intrinsics, (56, 56))
    depth = truth.depth.nan_to_num(1.0) * scale
    return {"pose_enc": pose[None], "depth": depth[None, ..., None], "depth_conf": depth[None]}


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


def test_a_network_that_knows_the_truth_has_no_error_in_any_units() -> None:
    truth = random_truth()
    found = measure_scene(predict(truth, scale=7.0), truth)
    assert found.abs_rel < 1e-5
    assert found.points < 1e-4
    assert found.rotation.max() < 0.1
    assert found.translation.max() < 0.1


def test_points_are_compared_in_units_of_the_scene_from_its_first_camera() -> None:
    truth = random_truth()
    wrong = predict(truth)
    wrong["pose_enc"][0, :, 0] += 0.3  # in each camera's own axes
    near = measure_scene(wrong, truth).points
    far = replace(truth, depth=truth.depth * 10, extrinsics=truth.extrinsics.clone())
    far.extrinsics[..., 3] *= 10
    wrong = predict(far)
    wrong["pose_enc"][0, :, 0] += 3.0
    assert measure_scene(wrong, far).points == pytest.approx(near, rel=1e-3)
    assert near > 0.01


def test_what_is_not_known_does_not_count() -> None:
    truth = random_truth()
    holes = truth.depth.clone()
    holes[:, :20] = math.nan
    told = predict(truth)
    told["depth"][:, :, :20] *= 5  # wrong, where nothing is known
    found = measure_scene(told, replace(truth, depth=holes))
    assert found.abs_rel < 1e-5
    assert found.points < 1e-4
    blind = measure_scene(told, replace(truth, depth=None, intrinsics=None))
    assert summarise([blind]).keys() == METRICS - {"abs_rel", "points"}
    assert changes([blind], [blind]).keys() == METRICS - {"abs_rel", "points"}


def test_between_cameras_in_one_place_there_is_no_direction() -> None:
    true = cameras(0, 20, 40)
    true[0, 1, :, 3] = turned(20) @ torch.zeros(3)  # where the first one stands
    _, translation = pose_errors(cameras(0, 20, 40), true)
    assert translation.isnan().tolist() == [[True, False, False]]


def test_angles_of_no_and_of_half_a_turn() -> None:
    found = angle_of(torch.stack([torch.eye(3), turned(180)]))
    assert torch.allclose(found, torch.tensor([0.0, 180.0]), atol=0.1)


def scene_of(rotation: list[float], *, points: float = 0.2) -> SceneErrors:
    angles = torch.tensor(rotation)
    return SceneErrors(abs_rel=0.1, points=points, rotation=angles, translation=2 * angles)


def test_numbers_are_over_all_pairs_of_all_scenes_however_many_each_has() -> None:
    found = summarise([scene_of([1.0, 2, 3]), scene_of([20.0], points=0.4)])
    assert found["points"] == pytest.approx(0.3)
    assert found["rotation"] == 2.0  # the lower one of the two in the middle
    assert found["rra@5"] == 0.75
    assert found["rta@5"] == 0.5
    assert found["rta@15"] == 0.75


def test_a_worse_number_is_a_positive_change_whichever_way_it_counts() -> None:
    dense = [scene_of([1.0, 2, 3, 20])] * 3
    worse = [scene_of([2.0, 4, 6, 40], points=0.3)] * 3
    found = changes(dense, worse)
    assert found["points"].value == pytest.approx(0.5)
    assert found["rotation"].value == pytest.approx(1.0)
    assert found["rra@5"].value == pytest.approx(1 / 3)
    assert found["abs_rel"] == Change(value=0.0, low=0.0, high=0.0)
    assert found["points"].low == pytest.approx(found["points"].high)  # the scenes are alike


def test_a_change_is_less_sure_the_more_scenes_differ() -> None:
    dense = [scene_of([1.0, 2, 3])] * 8
    mixed = [scene_of([1.0, 2, 3], points=0.1 if i % 2 else 0.4) for i in range(8)]
    found = changes(dense, mixed)["points"]
    assert found.low < 0.1 < found.value < found.high
    assert found.value == pytest.approx(0.25)


METRICS = {"abs_rel", "points", "rotation", "translation"} | {
    f"{kind}@{limit}" for kind in ("rra", "rta") for limit in (5, 15)
}


@pytest.mark.parametrize("make", [seeing_vggt, small_pi3])
def test_rows_hold_every_number_and_the_model_is_left_dense(make) -> None:
    model, scenes = make(), [random_truth(), random_truth(seed=1)]
    recipe = Recipe.of(BlockSparseConfig(keep=0.25, block_size=(4, 4)))
    dense, sparse = compare_views(model, {"quarter": recipe}, scenes)
    assert dense.metrics.keys() == sparse.metrics.keys() == sparse.change(dense).keys() == METRICS
    assert len(sparse.keep_by_site) >= 2
    assert 0.25 < (sparse.keep_measured or 0) < 0.8
    (again,) = compare_views(model, {}, scenes)
    assert again.metrics == pytest.approx(dense.metrics, nan_ok=True)


def test_one_view_is_refused() -> None:
    with pytest.raises(InputError, match="two or more"):
        compare_views(small_vggt(), {}, [random_truth(views=1)])
