"""The default configs have the names and shapes of the public checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from retrofit.architectures.blocks import Attention, Block
from retrofit.architectures.pi3 import Pi3
from retrofit.architectures.vggt import VGGT

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out_dim: int, in_dim: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def conv(name: str, out_dim: int, in_dim: int, size: int, *, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out_dim, in_dim, size, size)}
    return weight | ({f"{name}.bias": (out_dim,)} if bias else {})


def vit_block(name: str, dim: int, *, head_dim: int = 0, scaled: bool = True) -> Shapes:
    shapes = norm(f"{name}.norm1", dim) | norm(f"{name}.norm2", dim)
    shapes |= linear(f"{name}.attn.qkv", 3 * dim, dim) | linear(f"{name}.attn.proj", dim, dim)
    shapes |= linear(f"{name}.mlp.fc1", 4 * dim, dim) | linear(f"{name}.mlp.fc2", dim, 4 * dim)
    if head_dim:
        shapes |= norm(f"{name}.attn.q_norm", head_dim) | norm(f"{name}.attn.k_norm", head_dim)
    if scaled:
        shapes |= {f"{name}.ls1.gamma": (dim,), f"{name}.ls2.gamma": (dim,)}
    return shapes


def dino(name: str, *, mask_token: bool) -> Shapes:
    shapes: Shapes = {
        f"{name}.cls_token": (1, 1, 1024),
        f"{name}.register_tokens": (1, 4, 1024),
        f"{name}.pos_embed": (1, 1370, 1024),
    }
    shapes |= {f"{name}.mask_token": (1, 1024)} if mask_token else {}
    shapes |= conv(f"{name}.patch_embed.proj", 1024, 3, 14) | norm(f"{name}.norm", 1024)
    for index in range(24):
        shapes |= vit_block(f"{name}.blocks.{index}", 1024)
    return shapes


def dpt(name: str, out_dim: int | None, features: int) -> Shapes:
    channels = (256, 512, 1024, 1024)
    shapes = norm(f"{name}.norm", 2048)
    for index, count in enumerate(channels):
        shapes |= conv(f"{name}.projects.{index}", count, 2048, 1)
        layer = f"{name}.scratch.layer{index + 1}_rn"
        shapes |= conv(layer, features, count, 3, bias=False)
    shapes |= conv(f"{name}.resize_layers.0", 256, 256, 4)
    shapes |= conv(f"{name}.resize_layers.1", 512, 512, 2)
    shapes |= conv(f"{name}.resize_layers.3", 1024, 1024, 3)
    for index in (1, 2, 3, 4):
        fusion = f"{name}.scratch.refinenet{index}"
        shapes |= conv(f"{fusion}.out_conv", features, features, 1)
        for unit in (1, 2) if index < 4 else (2,):
            for layer in ("conv1", "conv2"):
                part = f"{fusion}.resConfUnit{unit}.{layer}"
                shapes |= conv(part, features, features, 3)
    if out_dim is None:
        return shapes | conv(f"{name}.scratch.output_conv1", features, features, 3)
    shapes |= conv(f"{name}.scratch.output_conv1", features // 2, features, 3)
    shapes |= conv(f"{name}.scratch.output_conv2.0", 32, features // 2, 3)
    return shapes | conv(f"{name}.scratch.output_conv2.2", out_dim, 32, 1)


def camera_head(name: str) -> Shapes:
    shapes = norm(f"{name}.token_norm", 2048) | norm(f"{name}.trunk_norm", 2048)
    shapes |= {f"{name}.empty_pose_tokens": (1, 1, 9)}
    shapes |= linear(f"{name}.embed_pose", 2048, 9)
    shapes |= linear(f"{name}.poseLN_modulation.1", 6144, 2048)
    shapes |= linear(f"{name}.pose_branch.fc1", 1024, 2048)
    shapes |= linear(f"{name}.pose_branch.fc2", 9, 1024)
    for index in range(4):
        shapes |= vit_block(f"{name}.trunk.{index}", 2048)
    return shapes


def tracker_block(name: str, attention: str, norms: tuple[str, ...]) -> Shapes:
    shapes: Shapes = {}
    for part in norms:
        shapes |= norm(f"{name}.{part}", 384)
    shapes |= {
        f"{name}.{attention}.in_proj_weight": (1152, 384),
        f"{name}.{attention}.in_proj_bias": (1152,),
    }
    shapes |= linear(f"{name}.{attention}.out_proj", 384, 384)
    return shapes | linear(f"{name}.mlp.fc1", 1536, 384) | linear(f"{name}.mlp.fc2", 384, 1536)


def track_head() -> Shapes:
    name = "track_head.tracker"
    shapes = dpt("track_head.feature_extractor", None, 128)
    shapes |= {f"{name}.query_ref_token": (1, 2, 388)}
    shapes |= linear(f"{name}.corr_mlp.fc1", 384, 567) | linear(f"{name}.corr_mlp.fc2", 128, 384)
    shapes |= norm(f"{name}.fmap_norm", 128) | norm(f"{name}.ffeat_norm", 128)
    shapes |= linear(f"{name}.ffeat_updater.0", 128, 128)
    shapes |= linear(f"{name}.vis_predictor.0", 1, 128)
    shapes |= linear(f"{name}.conf_predictor.0", 1, 128)
    name += ".updateformer"
    shapes |= {f"{name}.virual_tracks": (1, 64, 1, 384)}
    shapes |= norm(f"{name}.input_norm", 388) | linear(f"{name}.input_transform", 384, 388)
    shapes |= norm(f"{name}.output_norm", 384) | linear(f"{name}.flow_head", 130, 384)
    own, across = ("norm1", "norm2"), ("norm1", "norm_context", "norm2")
    for index in range(6):
        for part in ("time_blocks", "space_virtual_blocks"):
            shapes |= tracker_block(f"{name}.{part}.{index}", "attn", own)
        for part in ("space_point2virtual_blocks", "space_virtual2point_blocks"):
            shapes |= tracker_block(f"{name}.{part}.{index}", "cross_attn", across)
    return shapes


def vggt_without_tracker() -> Shapes:
    shapes: Shapes = {
        "aggregator.camera_token": (1, 2, 1, 1024),
        "aggregator.register_token": (1, 2, 4, 1024),
    }
    shapes |= dino("aggregator.patch_embed", mask_token=True) | camera_head("camera_head")
    shapes |= dpt("point_head", 4, 256) | dpt("depth_head", 2, 256)
    for index in range(24):
        for kind in ("frame", "global"):
            shapes |= vit_block(f"aggregator.{kind}_blocks.{index}", 1024, head_dim=64)
    return shapes


def pi3_shapes() -> Shapes:
    shapes: Shapes = {
        "register_token": (1, 1, 5, 1024),
        "image_mean": (1, 3, 1, 1),
        "image_std": (1, 3, 1, 1),
    }
    shapes |= dino("encoder", mask_token=False)
    for index in range(36):
        shapes |= vit_block(f"decoder.{index}", 1024, head_dim=64)
    for head, width in (("point", 1024), ("conf", 1024), ("camera", 512)):
        name = f"{head}_decoder"
        shapes |= linear(f"{name}.projects", 1024, 2048) | linear(f"{name}.linear_out", width, 1024)
        for index in range(5):
            shapes |= vit_block(f"{name}.blocks.{index}", 1024, scaled=False)
    shapes |= linear("point_head.proj", 588, 1024) | linear("conf_head.proj", 196, 1024)
    for unit in (0, 1):
        for layer in (1, 2, 3):
            shapes |= linear(f"camera_head.res_conv.{unit}.res_conv{layer}", 512, 512)
    for layer in ("more_mlps.0", "more_mlps.2"):
        shapes |= linear(f"camera_head.{layer}", 512, 512)
    return shapes | linear("camera_head.fc_t", 3, 512) | linear("camera_head.fc_rot", 9, 512)


def count(shapes: Shapes) -> float:
    """Parameters in millions."""
    return sum(math.prod(shape) for shape in shapes.values()) / 1e6


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def public_vggt() -> VGGT:
    with torch.device("meta"):
        return VGGT.from_config({})


@pytest.fixture(scope="module")
def public_pi3() -> Pi3:
    with torch.device("meta"):
        return Pi3.from_config({})


def test_the_expected_names_add_up_to_the_published_counts() -> None:
    whole = vggt_without_tracker() | track_head()
    assert len(whole) == 1797
    assert count(whole) == pytest.approx(1256.54, abs=0.005)
    assert count(track_head()) == pytest.approx(65.94, abs=0.005)
    assert len(pi3_shapes()) == 1210
    assert count(pi3_shapes()) == pytest.approx(958.70, abs=0.005)


def test_vggt_1b_has_every_name_and_shape_but_the_trackers(public_vggt: VGGT) -> None:
    assert shapes_of(public_vggt) == vggt_without_tracker()


def test_pi3_has_every_name_and_shape(public_pi3: Pi3) -> None:
    assert shapes_of(public_pi3) == pi3_shapes()


def test_the_hubs_flat_config_is_the_default_network(public_vggt: VGGT) -> None:
    with torch.device("meta"):
        flat = VGGT.from_config({"img_size": 518, "patch_size": 14, "embed_dim": 1024})
        hub = Pi3.from_config({"decoder_size": "large", "pos_type": "rope100"})
    assert shapes_of(flat) == shapes_of(public_vggt)
    assert shapes_of(hub) == pi3_shapes()


def layer_norms(model: nn.Module, part: str) -> Iterator[tuple[str, float]]:
    for name, module in model.get_submodule(part).named_modules():
        if isinstance(module, nn.LayerNorm):
            yield f"{part}.{name}", module.eps


def test_vggt_norms_have_the_originals_eps(public_vggt: VGGT) -> None:
    dino_norms = dict(layer_norms(public_vggt, "aggregator.patch_embed"))
    assert len(dino_norms) == 49
    assert set(dino_norms.values()) == {1e-6}
    for part in ("aggregator.frame_blocks", "aggregator.global_blocks", "depth_head", "point_head"):
        assert {eps for _, eps in layer_norms(public_vggt, part)} == {1e-5}
    camera = dict(layer_norms(public_vggt, "camera_head"))
    assert camera.pop("camera_head.adaln_norm") == 1e-6
    assert set(camera.values()) == {1e-5}


def test_pi3_norms_have_the_originals_eps(public_pi3: Pi3) -> None:
    assert {eps for _, eps in layer_norms(public_pi3, "encoder")} == {1e-6}
    decoder = dict(layer_norms(public_pi3, "decoder"))
    inner = {eps for name, eps in decoder.items() if name.endswith(("q_norm", "k_norm"))}
    outer = {eps for name, eps in decoder.items() if name.endswith(("norm1", "norm2"))}
    assert (inner, outer, len(decoder)) == ({1e-5}, {1e-6}, 4 * 36)
    for part in ("point_decoder", "conf_decoder", "camera_decoder"):
        assert {eps for _, eps in layer_norms(public_pi3, part)} == {1e-6}


def test_heads_and_layer_scales_are_the_originals(public_vggt: VGGT, public_pi3: Pi3) -> None:
    def head_dims(model: nn.Module, part: str) -> set[tuple[int, int]]:
        modules = model.get_submodule(part).modules()
        return {(m.num_heads, m.head_dim) for m in modules if isinstance(m, Attention)}

    assert head_dims(public_vggt, "aggregator") == {(16, 64)}
    assert head_dims(public_vggt, "camera_head") == {(16, 128)}
    for part in ("encoder", "decoder", "point_decoder", "conf_decoder", "camera_decoder"):
        assert head_dims(public_pi3, part) == {(16, 64)}
    scaled = Block(16, 2, init_values=0.01)
    assert torch.equal(scaled.ls1.gamma, torch.full((16,), 0.01))
    assert public_vggt.config.aggregator.init_values == 0.01
    assert public_vggt.config.dino is not None
    assert public_vggt.config.dino.init_values == 1.0
