"""VGGT as a whole: what it keeps, what depends on what, and the contexts it runs in."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrofit.architectures.camera_head import CameraHead
from retrofit.architectures.vggt import VGGT
from retrofit.architectures.vggt_config import CameraHeadConfig
from retrofit.layout.grid import TokenGrid
from retrofit.runtime.errors import InputError
from tests.architectures.small_networks import VGGT_CONFIG, small_vggt
from tests.architectures.watching import Watch

DENSE = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")


def some_images(batch: int = 1, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, frames, 3, 28, 42, generator=generator)


@torch.no_grad()
def predict(model: VGGT, images: Tensor, **options: Any) -> dict[str, Any]:
    return model(images, **options)


def assert_close(
    first: dict[str, Any], second: dict[str, Any], *, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    for name in DENSE:
        assert torch.allclose(first[name], second[name], rtol=rtol, atol=atol), name


def test_outputs_have_the_documented_shapes() -> None:
    outputs = predict(small_vggt(), some_images(2, 3))
    shapes = {name: tuple(outputs[name].shape) for name in DENSE}
    assert shapes == {
        "pose_enc": (2, 3, 9),
        "depth": (2, 3, 28, 42, 1),
        "depth_conf": (2, 3, 28, 42),
        "world_points": (2, 3, 28, 42, 3),
        "world_points_conf": (2, 3, 28, 42),
    }
    assert len(outputs["pose_enc_list"]) == 4
    assert torch.equal(outputs["pose_enc_list"][-1], outputs["pose_enc"])
    assert (outputs["pose_enc"][..., 7:] >= 0).all()
    assert (outputs["depth"] > 0).all()
    assert (outputs["depth_conf"] > 1).all()


def test_images_without_a_batch_axis_are_one_scene() -> None:
    assert_close(
        predict(small_vggt(), some_images()),
        predict(small_vggt(), some_images()[0]),
        rtol=0,
        atol=0,
    )


def test_a_head_that_is_left_out_gives_nothing() -> None:
    outputs = predict(small_vggt(camera_head=None, point_head=None), some_images())
    assert set(outputs) == {"depth", "depth_conf"}


def test_only_the_layers_asked_for_are_returned() -> None:
    aggregator = small_vggt().aggregator
    with torch.no_grad():
        every = aggregator(some_images(), range(6))
        some = aggregator(some_images(), (1, 4))
        last = aggregator(some_images())
    assert (list(every), list(some), list(last)) == ([0, 1, 2, 3, 4, 5], [1, 4], [5])
    assert some[4].shape == (1, 3, 5 + 6, 48)
    assert torch.equal(some[4], every[4])
    assert torch.equal(last[5], every[5])


def test_no_output_of_a_block_outlives_the_next_blocks() -> None:
    model = small_vggt()
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def remember(_: nn.Module, args: Any, out: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in made))
        made.append(weakref.ref(out))

    for block in [*model.aggregator.frame_blocks, *model.aggregator.global_blocks]:
        block.register_forward_hook(remember)
    predict(model, some_images())
    # The block's own input, and, in a layer that is kept, the frame half; never one per layer.
    assert max(alive) <= 2
    assert all(reference() is None for reference in made)


def test_the_grid_is_the_layout_of_the_global_sequence() -> None:
    model, images = small_vggt(), some_images(2, 3)
    grid = model.aggregator.grid(images.shape)
    assert grid == TokenGrid(frames=3, height=2, width=3, num_frame_prefix_tokens=5)
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("frame_blocks.1.attn", "global_blocks.1.attn"):
        model.aggregator.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: tuple(args[0].shape)})
        )
    predict(model, images)
    assert seen["global_blocks.1.attn"] == (2, grid.num_tokens, 24)
    assert seen["frame_blocks.1.attn"] == (2 * 3, grid.num_tokens // 3, 24)


def test_every_attention_reaches_the_interception_point() -> None:
    model = small_vggt()
    with Watch() as watch:
        predict(model, some_images())
    shapes = [tuple(call["q"].shape) for call in watch.calls]
    dino, frame, everything, camera = (3, 3, 11, 8), (3, 2, 11, 12), (1, 2, 33, 12), (1, 3, 3, 16)
    assert shapes == [dino, *6 * [frame, everything], *4 * 2 * [camera]]


def test_scenes_of_a_batch_do_not_see_each_other() -> None:
    model, images = small_vggt(), some_images(2, 3)
    both, alone = predict(model, images), predict(model, images[1:])
    assert_close({name: both[name][1:] for name in DENSE}, alone)


def test_the_order_of_all_but_the_first_frame_does_not_matter() -> None:
    model, images = small_vggt(), some_images(1, 4)
    plain = predict(model, images)
    order = [0, 3, 1, 2]
    moved = predict(model, images[:, order])
    assert_close({name: plain[name][:, order] for name in DENSE}, moved)
    other_first = predict(model, images[:, [1, 0, 2, 3]])
    assert not torch.allclose(plain["depth"][:, [1, 0, 2, 3]], other_first["depth"], rtol=1e-3)


@pytest.mark.parametrize("order", [["frame", "global"], ["global", "frame"]])
def test_blocks_come_in_groups_in_the_given_order(order: list[str]) -> None:
    aggregator_config = VGGT_CONFIG["aggregator"] | {"aa_block_size": 3, "aa_order": order}
    aggregator = small_vggt(aggregator=aggregator_config).aggregator
    ran: list[str] = []
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            ran.append(name)
            outputs[name] = out

        return hook

    for kind in ("frame", "global"):
        for index, block in enumerate(getattr(aggregator, f"{kind}_blocks")):
            block.register_forward_hook(note(f"{kind}{index}"))
    with torch.no_grad():
        layers = aggregator(some_images(), range(6))
    first, second = order
    expected = [f"{kind}{i}" for group in ((0, 1, 2), (3, 4, 5)) for kind in order for i in group]
    assert ran == expected
    halves = outputs["frame4"].reshape(1, 3, 11, 24), outputs["global4"].reshape(1, 3, 11, 24)
    assert torch.equal(layers[4], torch.cat(halves, dim=-1))


@pytest.mark.parametrize("frames_per_chunk", [1, 2, None])
def test_chunked_heads_do_not_change_the_result(frames_per_chunk: int | None) -> None:
    model, images = small_vggt(), some_images(1, 5)
    assert_close(predict(model, images), predict(model, images, frames_per_chunk=frames_per_chunk))


def test_offloading_does_not_change_the_result() -> None:
    model, images = small_vggt(), some_images(1, 5)
    assert_close(predict(model, images), predict(model, images, offload=True), rtol=0, atol=0)


def test_under_autocast_the_heads_run_in_float32() -> None:
    model, images = small_vggt(), some_images()
    plain = predict(model, images)
    seen: dict[str, torch.dtype] = {}
    trunk = "aggregator.frame_blocks.2.mlp.fc2"
    heads = ("camera_head.pose_branch", "depth_head.scratch.output_conv1")
    for name in (trunk, *heads):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = predict(model, images)
    assert seen == {trunk: torch.bfloat16} | dict.fromkeys(heads, torch.float32)
    assert_close(plain, mixed, rtol=0.2, atol=0.2)


def test_a_trunk_in_half_precision_feeds_heads_in_float32() -> None:
    model, images = small_vggt(), some_images()
    plain = predict(model, images)
    model.aggregator.to(torch.bfloat16)
    half = predict(model, images)
    assert {half[name].dtype for name in DENSE} == {torch.float32}
    assert_close(plain, half, rtol=0.2, atol=0.2)


def test_every_parameter_gets_a_gradient() -> None:
    model, images = small_vggt().train(), some_images()
    outputs = model(images)
    poses = sum(pose.square().mean() for pose in outputs.pop("pose_enc_list"))
    sum((value.square().mean() for value in outputs.values()), poses).backward()
    without = {
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    }
    assert without == {"aggregator.patch_embed.mask_token"}


def test_each_refinement_starts_from_the_detached_last_pose() -> None:
    head = CameraHead(CameraHeadConfig(dim_in=16, trunk_depth=1, num_heads=2)).double()
    tokens = torch.randn(1, 3, 16, dtype=torch.float64)
    second = head(tokens, 2)[1]
    changed = copy.deepcopy(head)
    changed.empty_pose_tokens.data += 1.0
    assert not torch.allclose(changed(tokens, 2)[1], second)
    (gradient,) = torch.autograd.grad(second.sum(), head.empty_pose_tokens, allow_unused=True)[:1]
    assert gradient is None


def shallow_vggt() -> tuple[VGGT, Tensor]:
    aggregator = VGGT_CONFIG["aggregator"] | {"depth": 1}
    head = VGGT_CONFIG["depth_head"] | {"intermediate_layer_idx": [0, 0, 0, 0]}
    camera = {"trunk_depth": 1, "num_heads": 3}
    parts = {"aggregator": aggregator, "depth_head": head, "camera_head": camera}
    return small_vggt(**parts, point_head=None), some_images()


def test_the_compiled_network_has_one_graph_and_the_same_result() -> None:
    model, images = shallow_vggt()
    plain = predict(model, images)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    for name in ("pose_enc", "depth", "depth_conf"):
        assert torch.allclose(plain[name], compiled[name], rtol=1e-4, atol=1e-5), name


def test_the_exported_network_takes_another_number_of_frames() -> None:
    model, images = shallow_vggt()
    frames = torch.export.Dim("frames", min=2, max=64)
    options = {"frames_per_chunk": None}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (images,),
            options,
            dynamic_shapes={"images": {1: frames}, **options},
            strict=False,
        )
        more = some_images(1, 5)
        exported = program.module()(more, **options)
    plain = predict(model, more)
    for name in ("pose_enc", "depth", "depth_conf"):
        assert torch.allclose(plain[name], exported[name], rtol=1e-4, atol=1e-5), name


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="VGGT: expected sides that are multiples of 14 pixels"):
        predict(small_vggt(), torch.rand(1, 2, 3, 30, 42))
    with pytest.raises(InputError, match="VGGT: expected images"):
        predict(small_vggt(), torch.rand(3, 28, 42))
