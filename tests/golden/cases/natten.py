"""Neighborhood attention in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrofit.kernels import neighborhood_attention
from retrofit.kernels.grid_window import first_key
from retrofit.layout.grid import TokenGrid
from retrofit.methods.neighborhood import NeighborhoodConfig
from tests.golden.cases.shared import attend_alone, weights_of
from tests.golden.harness import Meta, Tensors

NAMES = ("neighborhood attention", "natten")
TOLERANCE = (("*/out", "out"), ("*/lse", "lse"))
INPUTS = ("*/q", "*/k", "*/v")
CHECKED: tuple[str, ...] = ()


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """Tensors of the item that `name` belongs to."""
    label = name.split("/")[0]
    item = meta["items"][label]
    query, key, value = (_merge_grid(tensors[f"{label}/{part}"], item) for part in "qkv")
    settings = {
        "window_size": _three(item["kernel_size"], 1),
        "stride": _three(item["stride"], 1),
        "dilation": _three(item["dilation"], 1),
        "is_causal": _three(item["is_causal"], False),
    }
    frames, height, width = _three(item["shape"], 1)
    grid = TokenGrid(frames=frames, height=height, width=width)
    config = NeighborhoodConfig(**settings)
    out = attend_alone(config, grid, query, key, value)
    _, lse = neighborhood_attention(query, key, value, grid=grid, return_lse=True, **settings)
    computed = {
        "out": _split_grid(out, item),
        "lse": _split_grid(lse[..., None], item)[..., 0],
        "mask": weights_of(config, grid)[0, 0] > 0,
    }
    for axis, length in enumerate(item["shape"]):
        computed[f"first_key_axis{axis}"] = first_key(
            length,
            item["kernel_size"][axis],
            stride=item["stride"][axis],
            dilation=item["dilation"][axis],
            is_causal=item["is_causal"][axis],
        )
    return {f"{label}/{part}": tensor for part, tensor in computed.items()}


def _three(values: list[Any], missing: Any) -> tuple[Any, Any, Any]:
    first, second, third = [missing] * (3 - len(values)) + values
    return first, second, third


def _merge_grid(x: Tensor, item: Meta) -> Tensor:
    """`[B, *grid, H, D]` to `[B, H, S, D]`."""
    return x.flatten(1, len(item["shape"])).transpose(1, 2)


def _split_grid(x: Tensor, item: Meta) -> Tensor:
    return torch.unflatten(x.transpose(1, 2), 1, item["shape"])
