"""Compute the tensors of a recorded VGGT case from its config, images and weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrofit.architectures.cameras import decode_pose, unproject_depth
from retrofit.architectures.vggt import VGGT
from tests.architectures.watching import watch_attention


def build(meta: dict[str, Any], weights: dict[str, Tensor]) -> VGGT:
    """The network of a case, in evaluation mode, with the case's weights."""
    model = VGGT.from_config(meta["config"]).eval()
    model.load_state_dict(weights)
    return model


@torch.inference_mode()
def reproduce(
    meta: dict[str, Any], tensors: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a `vggt_*` case by name."""
    model = build(meta, weights)
    images = tensors["inputs/images"]
    aggregator = model.aggregator
    layers, call = watch_attention(
        aggregator.global_blocks[1].attn,
        lambda: aggregator(images, range(aggregator.config.depth)),
    )
    computed = {f"stages/aggregated_{layer}": tokens for layer, tokens in layers.items()}
    computed["stages/patch_tokens"] = aggregator.embed_patches(images)
    computed |= {f"global1/{name}": call[name] for name in ("q", "k", "v", "attn_in", "attn_out")}
    computed["global1/attn_heads_out"] = call["heads_out"]
    computed["global1/pos"] = global_positions(model, images)
    return computed | {f"outputs/{name}": value for name, value in _outputs(model, images).items()}


@torch.inference_mode()
def reproduce_sparse_dense_part(
    meta: dict[str, Any], tensors: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a `sparse_vggt*` case that the dense network gives."""
    model = build(meta, weights)
    images = tensors["inputs/images"]
    aggregator = model.aggregator
    layers, call = watch_attention(aggregator.global_blocks[1].attn, lambda: aggregator(images))
    computed = {f"g1/{name}": call[name] for name in ("q", "k", "v", "attn_in")}
    computed["g1/dense_heads_out"] = call["heads_out"]
    computed["g1/pos"] = global_positions(model, images)
    computed["run/dense_last"] = layers[aggregator.config.depth - 1]
    return computed


def global_positions(model: VGGT, images: Tensor) -> Tensor:
    """Positions of the sequence that a global block sees, int64 [B, N * P, 2]."""
    grid = model.aggregator.grid(images.shape)
    positions = model.aggregator.positions(grid.height, grid.width)
    return positions.repeat(grid.frames, 1).expand(images.shape[0], -1, -1)


def _outputs(model: VGGT, images: Tensor) -> dict[str, Tensor]:
    predictions = model(images)
    poses = predictions.pop("pose_enc_list")
    size = (images.shape[-2], images.shape[-1])
    extrinsics, intrinsics = decode_pose(predictions["pose_enc"], size)
    points = unproject_depth(predictions["depth"].squeeze(-1), extrinsics, intrinsics)
    return predictions | {
        **{f"pose_enc_iter{index}": pose for index, pose in enumerate(poses)},
        "extrinsic": extrinsics,
        "intrinsic": intrinsics,
        "points_from_depth": points[0],
    }
