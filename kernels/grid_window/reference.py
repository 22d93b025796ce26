"""The definition: masks of `[N, N]` and dense attention under them. For tests and small inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.plain import softmax_and_lse
from retrofit.layout.grid import TokenGrid, split_positions

from .arguments import as_grid, check_neighborhood, check_window


def neighborhood_axis_mask(
    length: int, window_size: int, stride: int, dilation: int, is_causal: bool
) -> Tensor:
    """Which coordinates (columns) a coordinate (rows) sees, bool `[length, length]`."""
    i = torch.arange(length)[:, None]
    j = torch.arange(length)[None, :]
    query, key = i // dilation, j // dilation
    same_group = i % dilation == j % dilation
    last = (length - i % dilation + dilation - 1) // dilation - 1
    if is_causal:
        leader = torch.minimum(query // stride * stride + stride - 1, last)
        return same_group & (key <= query) & (leader - key < window_size)
    size = torch.clamp(last + 1, max=window_size)
    left = size // 2
    right = left + size % 2 - 1
    leader = torch.minimum(query // stride * stride + stride // 2, last)
    center = torch.maximum(torch.minimum(leader, last - right), left)
    return same_group & (key >= center - left) & (key <= center + right)


def window_axis_mask(
    length: int, window_size: int, shift: int | Tensor, strided: bool, is_causal: bool
) -> Tensor:
    """Which coordinates (columns) a coordinate (rows) sees, bool `[length, length]`."""
    coordinate = torch.arange(length)
    rolled = (coordinate - shift) % length
    group = rolled % -(-length // window_size) if strided else rolled // window_size
    mask = group[:, None] == group[None, :]
    return mask & (coordinate[None, :] <= coordinate[:, None]) if is_causal else mask


def combine_axis_masks(grid: TokenGrid, axes: list[Tensor]) -> Tensor:
    """Product of the three axis masks, with special tokens seen by all and seeing all."""
    t, y, x = axes
    n = grid.num_grid_tokens
    inner = t[:, None, None, :, None, None] & y[None, :, None, None, :, None]
    inner = (inner & x[None, None, :, None, None, :]).reshape(n, n)
    if not grid.num_special_tokens:
        return inner
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    _, tokens = split_positions(grid)
    mask[tokens[:, None], tokens[None, :]] = inner
    return mask


def neighborhood_mask(
    grid: TokenGrid | Sequence[int],
    window_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    num_prefix_tokens: int = 0,
    num_suffix_tokens: int = 0,
) -> Tensor:
    """Which keys each query of `neighborhood_attention` sees.

    Returns:
        bool `[S, S]`, rows are queries.
    """
    layout = as_grid(grid, num_prefix_tokens, num_suffix_tokens)
    axes = check_neighborhood(layout, window_size, stride, dilation, is_causal)
    return combine_axis_masks(layout, [neighborhood_axis_mask(*axis) for axis in axes])


def window_mask(
    grid: TokenGrid | Sequence[int],
    window_size: int | Sequence[int],
    *,
    shift: int | Sequence[int] | Tensor = 0,
    strided: bool = False,
    is_causal: bool | Sequence[bool] = False,
    num_prefix_tokens: int = 0,
    num_suffix_tokens: int = 0,
) -> Tensor:
    """Which keys each query of `window_attention` sees.

    Returns:
        bool `[S, S]`, rows are queries.
    """
    layout = as_grid(grid, num_prefix_tokens, num_suffix_tokens)
    axes = check_window(layout, window_size, shift, is_causal)
    return combine_axis_masks(
        layout, [window_axis_mask(n, w, s, strided, c) for n, w, s, c in axes]
    )


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention under a mask, in float32 (float64 for float64 inputs).

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, S, D_v]`.
        mask: bool, broadcastable to `[B, H, S, S]`, or None.
        attn_mask: A second mask, bool or to be added to the scores.
        scale: Factor of the scores, `1 / sqrt(D)` by default.

    Returns:
        Output `[B, H, S, D_v]` in the dtype of `query`, and the log-sum-exp `[B, H, S]`. A query
        that sees nothing gives 0 and -inf.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    k = key.to(work).repeat_interleave(groups, 1)
    v = value.to(work).repeat_interleave(groups, 1)
    scores = query.to(work) @ k.transpose(-2, -1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    for m in (mask, attn_mask):
        if m is not None and m.dtype == torch.bool:
            scores = scores.masked_fill(~m.to(scores.device), -math.inf)
        elif m is not None:
            scores = scores + m
    weights, lse = softmax_and_lse(scores)
    return (weights @ v).to(query.dtype), lse
