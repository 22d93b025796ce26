"""Pi3 as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.architectures.pi3 import Pi3
from retrofit.architectures.pi3_heads import PixelHead, PoseHead, nearest_rotation
from retrofit.layout.grid import TokenGrid
from retrofit.runtime.errors import InputError
from tests.architectures.small_networks import PI3_CONFIG, small_pi3
from tests.architectures.watching import Watch

NAMES = ("points", "local_points", "conf", "camera_poses")


def some_images(batch: int = 1, frames: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, frames, 3, 28, 42, generator=generator).to(dtype)


def exact(frames: int, batch: int = 1) -> tuple[Pi3, Tensor]:
    """Network and images in float64: the distances are exponentials, and large."""
    return small_pi3().double(), some_images(batch, frames, torch.float64)


@torch.no_grad()
def predict(model: Pi3, images: Tensor, **options: Any) -> dict[str, Tensor]:
    return model(images, **options)


def assert_close(
    first: dict[str, Tensor], second: dict[str, Tensor], *, rtol: float = 1e-9, atol: float = 1e-9
) -> None:
    for name in NAMES:
        assert torch.allclose(first[name], second[name], rtol=rtol, atol=atol), name


def test_outputs_have_the_documented_shapes() -> None:
    outputs = predict(small_pi3(), some_images(2, 3))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "points": (2, 3, 28, 42, 3),
        "local_points": (2, 3, 28, 42, 3),
        "conf": (2, 3, 28, 42, 1),
        "camera_poses": (2, 3, 4, 4),
    }
    poses = outputs["camera_poses"]
    rotation = poses[..., :3, :3]
    identity = torch.eye(3).expand_as(rotation)
    assert torch.allclose(rotation @ rotation.transpose(-1, -2), identity, atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(2, 3), atol=1e-5)
    assert torch.equal(poses[..., 3, :], torch.tensor([0.0, 0, 0, 1]).expand(2, 3, 4))


def test_world_points_are_the_local_points_moved_by_the_pose() -> None:
    outputs = predict(*exact(3))
    local = outputs["local_points"]
    ones = torch.ones_like(local[..., :1])
    moved = torch.einsum(
        "bnij,bnhwj->bnhwi", outputs["camera_poses"], torch.cat([local, ones], dim=-1)
    )
    assert torch.allclose(outputs["points"], moved[..., :3], rtol=1e-9, atol=1e-9)


def test_the_order_of_the_frames_does_not_matter() -> None:
    (model, images), order = exact(4), [2, 0, 3, 1]
    plain, moved = predict(model, images), predict(model, images[:, order])
    assert_close({name: value[:, order] for name, value in plain.items()}, moved)


def test_scenes_of_a_batch_do_not_see_each_other() -> None:
    model, images = exact(3, batch=2)
    both, alone = predict(model, images), predict(model, images[1:])
    assert_close({name: value[1:] for name, value in both.items()}, alone)


def test_odd_blocks_attend_over_all_frames_and_even_ones_within_one() -> None:
    model, images = small_pi3(), some_images(2, 3)
    grid = model.grid(images.shape)
    assert grid == TokenGrid(frames=3, height=2, width=3, num_frame_prefix_tokens=5)
    with Watch() as watch:
        predict(model, images)
    shapes = [tuple(call["q"].shape) for call in watch.calls]
    encoder, frame, everything = (6, 3, 11, 8), (6, 2, 11, 12), (2, 2, grid.num_tokens, 12)
    heads = 3 * 2 * [(6, 2, 11, 8)]
    assert shapes == [encoder, frame, everything, frame, everything, *heads]


@pytest.mark.parametrize("options", [{"frames_per_chunk": 2}, {"frames_per_chunk": None}])
def test_chunked_heads_do_not_change_the_result(options: dict[str, Any]) -> None:
    model, images = exact(5)
    assert_close(predict(model, images), predict(model, images, **options))


def test_offloading_does_not_change_the_result() -> None:
    model, images = small_pi3(), some_images(1, 5)
    assert_close(predict(model, images), predict(model, images, offload=True), rtol=0, atol=0)


def test_images_without_a_batch_axis_are_one_scene() -> None:
    model, images = small_pi3(), some_images()
    assert_close(predict(model, images), predict(model, images[0]), rtol=0, atol=0)


def test_half_precision_and_autocast_end_in_float32() -> None:
    model, images = small_pi3(), some_images()
    plain = predict(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = predict(model, images)
    assert {mixed[name].dtype for name in NAMES} == {torch.float32}
    assert torch.allclose(plain["conf"], mixed["conf"], rtol=0.2, atol=0.2)


def test_every_parameter_gets_a_gradient() -> None:
    model = small_pi3().train()
    outputs = model(some_images())
    sum(value.square().mean() for value in outputs.values()).backward()
    missing = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert missing == []


def test_the_compiled_network_has_one_graph_and_the_same_result() -> None:
    sizes = {"dec_depth": 2, "head": PI3_CONFIG["head"] | {"depth": 1}}
    model, images = Pi3.from_config(PI3_CONFIG | sizes).eval(), some_images()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    assert_close(predict(model, images), compiled, rtol=1e-4, atol=1e-4)


def test_the_exported_network_has_the_same_result() -> None:
    model, images = small_pi3(), some_images()
    with torch.no_grad():
        exported = torch.export.export(model, (images,), strict=False).module()(images)
    assert_close(predict(model, images), exported, rtol=1e-4, atol=1e-4)


def test_a_patch_token_becomes_the_pixels_of_its_patch() -> None:
    head = PixelHead(4, 3, 2)
    tokens = torch.randn(1, 6, 4)
    maps = head(tokens, (2, 3))
    assert maps.shape == (1, 6, 9, 2)
    values = head.proj(tokens[0, 5]).reshape(2, 3, 3)  # channel, row, column
    assert torch.allclose(maps[0, 3:, 6:], values.permute(1, 2, 0), atol=1e-6)


def test_the_nearest_rotation_undoes_a_reflection() -> None:
    matrices = torch.randn(400, 3, 3, dtype=torch.float64)
    rotation = nearest_rotation(matrices)
    assert (torch.linalg.det(matrices) < 0).any()
    one = torch.ones(400, dtype=torch.float64)
    assert torch.allclose(torch.linalg.det(rotation), one, atol=1e-12)
    scaled = matrices / matrices.norm(dim=-1, keepdim=True)
    found = (rotation * scaled).sum((-1, -2))
    # No other rotation lies nearer: turn it a little about each axis, both ways.
    for axis in range(3):
        for angle in (-0.01, 0.01):
            skew = torch.zeros(3, 3, dtype=torch.float64)
            skew[axis - 2, axis - 1], skew[axis - 1, axis - 2] = angle, -angle
            other = rotation @ torch.linalg.matrix_exp(skew)
            assert ((other * scaled).sum((-1, -2)) <= found + 1e-12).all()


def test_a_rotation_is_its_own_nearest_rotation() -> None:
    rotation = nearest_rotation(torch.randn(50, 3, 3, dtype=torch.float64))
    assert torch.allclose(nearest_rotation(3 * rotation), rotation, atol=1e-12)


def test_half_precision_poses_are_computed_in_float32() -> None:
    head = PoseHead(8).bfloat16()
    pose = head(torch.randn(2, 5, 8))
    assert pose.dtype == torch.bfloat16
    assert pose.shape == (2, 4, 4)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="Pi3: expected sides that are multiples of 14 pixels"):
        predict(small_pi3(), torch.rand(1, 2, 3, 30, 42))
