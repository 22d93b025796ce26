"""Compute the tensors of a recorded Pi3 case from its config, images and weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrofit.architectures.pi3 import Pi3
from tests.architectures.watching import watch_attention


def build(meta: dict[str, Any], weights: dict[str, Tensor]) -> Pi3:
    """The network of a case, in evaluation mode, with the case's weights."""
    registers = {"num_register_tokens": weights["register_token"].shape[2]}
    model = Pi3.from_config(meta["config"] | registers).eval()
    model.load_state_dict(weights)
    return model


@torch.inference_mode()
def reproduce(
    meta: dict[str, Any], tensors: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a `pi3*` case by name, but for `sparse/*`, which need the method."""
    model = build(meta, weights)
    images = tensors["inputs/images"]
    grid = model.grid(images.shape)
    patches = model.encode(images)
    hidden, call = watch_attention(
        model.decoder[1].attn,
        lambda: model.decode(patches, (grid.height, grid.width), images.shape[0]),
    )
    positions = model.positions(grid.height, grid.width)
    computed = {
        "stages/encoder_patch_tokens": patches,
        "stages/decode_hidden": hidden,
        "stages/decode_pos": positions.expand(patches.shape[0], -1, -1),
        "global1/attn_heads_out": call["heads_out"],
    }
    computed |= {f"global1/{name}": call[name] for name in ("q", "k", "v")}
    return computed | {f"outputs/{name}": value for name, value in model(images).items()}
