"""Block-sparse attention by itself, and in our VGGT through a patch."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import retrofit
from retrofit.kernels import pooled_scores
from retrofit.layout.grid import TokenGrid, split_positions
from retrofit.layout.token_order import hilbert_order, token_order
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.patterns import Blocks
from tests.architectures.golden_vggt import build, reproduce_sparse_dense_part
from tests.golden.cases.shared import attend_alone, pattern_alone, watch_site
from tests.golden.harness import Meta, Tensors

NAMES = ("block-sparse global attention for VGGT", "sparse_vggt")
TOLERANCE = (
    ("*/pooled_*", "pooled"),
    ("run/*_last", "run/*_last"),
    ("*", "patch_out/special_out"),
)
INPUTS = ("u*/q", "u*/k", "u*/v")
CHECKED: tuple[str, ...] = ()
DENSE = ("q", "k", "v", "attn_in", "dense_heads_out", "pos")


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """Tensors of the part that `name` belongs to."""
    part, what = name.split("/", 1)
    if part == "hilbert":
        return _orders(meta, tensors)
    if name == "run/dense_last" or (part.startswith("g") and what in DENSE):
        return reproduce_sparse_dense_part(meta, dict(tensors), dict(weights))
    if part == "run":
        return _run_network(meta, tensors, weights, what)
    if what.startswith("module_out_"):
        return {name: _run_module(meta, tensors, weights, name)}
    return _run_operator(meta, tensors, part, what)


def make_config(settings: Meta, *, pooling: str, literal: bool) -> BlockSparseConfig:
    """Our settings for upstream's, which say what is dropped."""
    keep, mass = 1 - settings.get("sparse_ratio", 1.0), settings.get("cdf_threshold")
    return BlockSparseConfig(
        keep=keep if keep > 0 else None,
        mass=0.0 if mass is None and keep <= 0 else mass,  # the least there is: one block
        pooling=pooling,  # type: ignore[arg-type]
        order="hilbert" if settings.get("hilbert") else "raster",
        upstream_selection=literal,
    )


def _run_operator(meta: Meta, tensors: Tensors, part: str, what: str) -> dict[str, Tensor]:
    """One tensor of a stand-alone call, from recorded queries, keys and values."""
    layout = meta["selection"][f"{part}/"]
    special = layout["special_per_frame"]
    grid = TokenGrid(
        frames=layout["N_frames"],
        width=layout["tokens_per_frame"] - special,
        num_frame_prefix_tokens=special,
    )
    query, key, value = (tensors[f"{part}/{letter}"] for letter in "qkv")
    special_at, patch_at = split_positions(grid)
    if what.startswith("pooled_"):
        patches = (query[:, :, patch_at], key[:, :, patch_at])
        pooling: Any = what.removeprefix("pooled_")
        return {f"{part}/{what}": pooled_scores(*patches, pooling=pooling)}
    names = "|".join(layout["settings"])
    found = re.fullmatch(rf"(mask|patch_out_literal|patch_out_ideal)_({names})|special_out", what)
    if found is None:
        return {}
    kind, label = (
        (found[1], found[2]) if found[1] else ("special_out", next(iter(names.split("|"))))
    )
    config = make_config(
        layout["settings"][label],
        pooling=label.split("_")[0],
        literal=kind != "patch_out_ideal",
    )
    if kind == "mask":  # also where the method would run the dense attention itself
        return {f"{part}/{what}": block_map(config, grid, query, key)}
    out = attend_alone(config, grid, query, key, value)
    return {f"{part}/{what}": out[:, :, special_at if kind == "special_out" else patch_at]}


def _run_network(meta: Meta, tensors: Tensors, weights: Tensors, what: str) -> dict[str, Tensor]:
    """Last output and block maps of one run of the whole aggregator."""
    run = re.sub(r"_(last|mask_layer\d+)$", "", what)
    info = meta["runs"][run]
    config = make_config(info, pooling=info["pool"], literal=info["attention"] == "literal")
    aggregator = build(meta, dict(weights)).aggregator
    with retrofit.patch(aggregator, config) as patch, ExitStack() as stack:
        calls = [stack.enter_context(watch_site(site)) for site in patch.sites.values()]
        layers = aggregator(tensors["inputs/images"])
    computed = {f"run/{run}_last": layers[aggregator.config.depth - 1]}
    grid = aggregator.grid(tensors["inputs/images"].shape)
    for layer, (call,) in enumerate(calls):
        computed[f"run/{run}_mask_layer{layer}"] = block_map(config, grid, call.query, call.key)
    return computed


def block_map(config: BlockSparseConfig, grid: TokenGrid, query: Tensor, key: Tensor) -> Tensor:
    """The blocks of a call, over the columns that upstream's map has in either kind of run."""
    pattern = pattern_alone(replace(config, upstream_selection=True), grid, query, key)
    if isinstance(pattern, Blocks):
        return pattern.block_map
    assert pattern.is_dense
    rows, columns = (
        math.ceil(length / block)
        for length, block in zip(
            (grid.num_grid_tokens, grid.num_tokens), config.block_size, strict=True
        )
    )
    return torch.ones(*query.shape[:2], rows, columns, dtype=torch.bool)


def _run_module(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> Tensor:
    """The attention module of the recorded block with its projection, from its recorded input."""
    part, what = name.split("/")
    ratio, kind = re.fullmatch(r"module_out_ratio(\d+)_(literal|ideal)", what).groups()  # type: ignore[union-attr]
    settings = {"sparse_ratio": int(ratio) / 100}
    config = make_config(settings, pooling="avg", literal=kind == "literal")
    aggregator = build(meta, dict(weights)).aggregator
    module = aggregator.global_blocks[int(part[1:])].attn
    rotations = []
    hook = module.register_forward_hook(lambda module, args, out: rotations.append(args[1]))
    with retrofit.patch(aggregator, config):
        aggregator(tensors["inputs/images"])  # which tells the site its grid
        hook.remove()
        return module(tensors[f"{part}/attn_in"], rotations[0])


def _orders(meta: Meta, tensors: Tensors) -> dict[str, Tensor]:
    computed = {}
    for height, width in meta["hilbert_grids_HxW"]:
        order = torch.tensor(hilbert_order(height, width))
        computed[f"hilbert/{height}x{width}"] = order
        computed[f"hilbert/{height}x{width}_inverse"] = order.argsort()
    height, width = meta["hilbert_grids_HxW"][0]
    example = tensors.get("hilbert/offset_example")
    if example is not None:
        frames = example.shape[1] // (height * width)
        grid = TokenGrid(frames=frames, height=height, width=width)
        order = token_order(grid, "hilbert")
        computed["hilbert/offset_example"] = order.expand(example.shape[0], -1)
    return computed
