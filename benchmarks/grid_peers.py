"""Other people's operators inside a pattern on a grid; a peer that can't run says why."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import flex
from benchmarks.peers import Missing, import_failure
from retrofit.patterns import Mean, Neighborhood, Pattern, Windows
from retrofit.profiling.bench.attention import Attention, Route
from retrofit.profiling.bench.patterns import Size


@dataclass(frozen=True, kw_only=True)
class GridProblem:
    """Attention inside a pattern on a grid, for the peers.

    Attributes:
        attention: Queries, keys and values.
        pattern: What is seen, on a grid without special tokens.
        ours: Our own route.
    """

    attention: Attention
    pattern: Pattern
    ours: Route


def flex_on_grid(
    problem: GridProblem, *, block: int = 128, mode: str = "default"
) -> Route | Missing:
    """FlexAttention with the pattern as a mask over tokens in raster order."""
    if isinstance(problem.pattern, Mean):
        return Missing(name="flex", reason="two branches are no single mask")
    attention = problem.attention
    block_mask = flex_grid_mask(problem, block)
    compiled = flex.compiled_flex(mode)

    def run() -> Tensor:
        out: Tensor = compiled(
            attention.query, attention.key, attention.value, block_mask=block_mask
        )
        return out

    name = "flex" if mode == "default" else "flex_autotuned"
    visited = float(
        block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum()
    ) / math.prod(block_mask.kv_indices.shape[-2:])
    details = {
        **problem.ours.details,
        "visited": visited,
        "list_full_fraction": float(
            block_mask.full_kv_num_blocks.sum()
            / (block_mask.kv_num_blocks + block_mask.full_kv_num_blocks).sum()
        ),
    }
    return replace(problem.ours, name=name, run=run, is_compiled=True, details=details)


def flex_grid_mask(problem: GridProblem, block: int) -> Any:
    """The block mask, a row of blocks at a time: `create_block_mask` would look at all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    seq_len = problem.attention.shape.seq_len
    device, mask_mod = problem.attention.query.device, problem.pattern.mask_mod
    zero = torch.zeros((), dtype=torch.int64, device=device)
    num = -(-seq_len // block)
    keys = torch.arange(num * block, device=device)
    some, every = [], []
    for start in range(0, seq_len, block):
        rows = torch.arange(start, min(start + block, seq_len), device=device)[:, None]
        seen = mask_mod(zero, zero, rows, keys.clamp(max=seq_len - 1)) & (keys < seq_len)
        blocks = seen.unflatten(1, (num, block))
        some.append(blocks.any(2).any(0))
        lengths = (seq_len - keys[::block]).clamp(max=block)
        every.append((blocks.sum(2) == lengths).all(0))
    whole = torch.stack(every)[None, None]
    partial = torch.stack(some)[None, None] & ~whole
    return BlockMask.from_kv_blocks(
        *flex.lists_of(partial),
        *flex.lists_of(whole),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(seq_len, seq_len),
    )


def natten_on_grid(problem: GridProblem) -> Route | Missing:
    """NATTEN's neighborhood attention, by the backend that it chooses here."""
    if reason := import_failure("natten"):
        return Missing(name="natten", reason=reason)
    if not isinstance(problem.pattern, Neighborhood):
        return Missing(name="natten", reason="has no such pattern")
    natten = importlib.import_module("natten")
    attend = importlib.import_module("natten.functional").neighborhood_attention_generic
    attention, window = problem.attention, problem.pattern.window_size
    grid = problem.pattern.layout.shape
    compiles = not natten.HAS_LIBNATTEN  # then it hands the call to FlexAttention
    # it takes tokens before heads; the transposition is no part of what is timed
    tensors = [
        x.transpose(1, 2).unflatten(1, grid).contiguous()
        for x in (attention.query, attention.key, attention.value)
    ]

    def run() -> Tensor:
        made: Tensor = attend(*tensors, kernel_size=window, torch_compile=compiles)
        return made.flatten(1, 3).transpose(1, 2)

    return replace(problem.ours, name="natten", run=run, is_compiled=compiles)


def rearranged(problem: GridProblem) -> Route | Missing:
    """What methods do without an operator: rearrange boxes into the batch, PyTorch's attention.

    For contiguous or strided boxes that divide the grid, or the mean over both.
    """
    pattern = problem.pattern
    parts = pattern.parts if isinstance(pattern, Mean) else (pattern,)
    boxes = [part for part in parts if isinstance(part, Windows) and not any(part.shift)]
    if len(boxes) < len(parts):
        return Missing(name="rearrange", reason="only for boxes that are not rolled")
    attention, grid, window = problem.attention, pattern.layout.shape, boxes[0].window_size
    if any(n % w for n, w in zip(grid, window, strict=True)):
        return Missing(name="rearrange", reason="the boxes do not divide the grid")
    counts = tuple(n // w for n, w in zip(grid, window, strict=True))

    def run() -> Tensor:
        outs = [_attend_in_boxes(attention, grid, window, counts, box.strided) for box in boxes]
        return outs[0] if len(outs) == 1 else torch.stack(outs).mean(0)

    return replace(problem.ours, name="rearrange", run=run)


def _attend_in_boxes(
    attention: Attention, grid: Size, window: Size, counts: Sequence[int], strided: bool
) -> Tensor:
    batch, heads, _, dim = attention.query.shape
    axes = [(w, c) if strided else (c, w) for w, c in zip(window, counts, strict=True)]
    split = (batch, heads, *(n for pair in axes for n in pair), dim)
    boxes, inside = ((3, 5, 7), (2, 4, 6)) if strided else ((2, 4, 6), (3, 5, 7))
    order = (0, *boxes, 1, *inside, 8)
    packed = [
        x.reshape(split).permute(order).reshape(-1, heads, math.prod(window), dim)
        for x in (attention.query, attention.key, attention.value)
    ]
    out = scaled_dot_product_attention(*packed)
    shape = [split[axis] for axis in order]
    back = [order.index(axis) for axis in range(len(order))]
    return out.reshape(shape).permute(back).reshape(batch, heads, -1, dim)
