"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrofit.kernels._dispatch import forced_backend
from retrofit.layout.grid import TokenGrid

from .arguments import (
    align_dtypes,
    as_four_dims,
    as_grid,
    check_tensors,
    per_axis,
)
from .backends import operator_of
from .ops import grid_window
from .pattern import Pattern, neighborhood_pattern, window_pattern
from .reference import masked_attention, pattern_mask
from .tiled import tiled_attention

PerAxis = int | Sequence[int]
CausalAxes = bool | Sequence[bool]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: TokenGrid | Sequence[int],
    window_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: CausalAxes = False,
    num_prefix_tokens: int = 0,
    num_suffix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attend to a window around each query, pushed inward at the borders of the grid.

    Paper: https://arxiv.org/abs/2504.16922 (section 3). An axis shows a query `window_size` keys
    at distance `dilation`; groups of `stride` queries share the window of their leader; a causal
    axis shows keys up to the query. What is seen is the product over the axes. Departure: a window
    larger than the axis (with a dilation: than the query's dilation group) means all of it.

    Args:
        query: `[B, H, S, D]`, any floating dtype, any strides.
        key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, S, D_v]`.
        grid: `(frames, height, width)` in raster order, or a TokenGrid with its special tokens.
        window_size: Keys per query on an axis, itself included; one value or one per axis.
        stride: Queries that share a window, at most `window_size`; one value or one per axis.
        dilation: Distance of neighboring keys; one value or one per axis.
        is_causal: Whether a query sees no key after it; one value or one per axis.
        num_prefix_tokens: Special tokens before the grid, for the tuple form of `grid`.
        num_suffix_tokens: Special tokens after the grid, for the tuple form of `grid`.
        attn_mask: bool (True is seen) or added to the scores; broadcasts to `[B, H, S, S]`.
        scale: Factor of the scores, `1 / sqrt(D)` by default.
        return_lse: Also return the natural log-sum-exp of the scaled scores.
        backend: `native`, `torch` or `reference`; None takes `RETROFIT_BACKEND`, else the first
            that can run the call. `torch` leaves no operator of ours in a traced graph, so that
            an exported program loads without retrofit.

    Returns:
        Output `[B, H, S, D_v]`, or `(output, lse)` with lse float32 `[B, H, S]`. A query that sees
        nothing (by `attn_mask`) gives 0 and -inf.

    Raises:
        GridError: If a sequence does not have the grid's length.
        ConfigError: If shapes, settings or the backend's name do not fit.
        UnsupportedError: If the backend that was asked for can't run the call.
    """
    layout = as_grid(grid, num_prefix_tokens, num_suffix_tokens)
    pattern = neighborhood_pattern(layout, window_size, stride, dilation, is_causal)
    return pattern_attention(
        query,
        key,
        value,
        pattern,
        attn_mask=attn_mask,
        scale=scale,
        return_lse=return_lse,
        backend=backend,
    )


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: TokenGrid | Sequence[int],
    window_size: PerAxis,
    shift: PerAxis | Tensor = 0,
    strided: bool = False,
    num_prefix_tokens: int = 0,
    num_suffix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    is_causal: CausalAxes = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Cut the grid into windows and attend inside each.

    Papers: https://arxiv.org/abs/2311.17528 (shifted windows: the grid is rolled by `-shift`
    before it is cut, and nothing is masked across the seam), https://arxiv.org/abs/2512.13492
    (contiguous and strided windows).

    Args:
        query: `[B, H, S, D]`, any floating dtype, any strides.
        key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, S, D_v]`.
        grid: `(frames, height, width)` in raster order, or a TokenGrid with its special tokens.
        window_size: Tokens per window on an axis, the last window may be short; one value or one
            per axis. A window larger than the axis means all of it.
        shift: Cyclic shift of the windows, one value or one per axis: integers, or an int64 tensor
            `[]` or `[3]` (a change of its values never recompiles).
        strided: Windows of every n-th token of an axis, `n = ceil(length / window_size)`, in
            place of contiguous ones.
        num_prefix_tokens: Special tokens before the grid, for the tuple form of `grid`.
        num_suffix_tokens: Special tokens after the grid, for the tuple form of `grid`.
        attn_mask: bool (True is seen) or added to the scores; broadcasts to `[B, H, S, S]`.
        is_causal: Whether a query sees no key after it on an axis; one value or one per axis.
        scale: Factor of the scores, `1 / sqrt(D)` by default.
        return_lse: Also return the natural log-sum-exp of the scaled scores.
        backend: `native`, `torch` or `reference`; None takes `RETROFIT_BACKEND`, else the first
            that can run the call. `torch` leaves no operator of ours in a traced graph, so that
            an exported program loads without retrofit.

    Returns:
        Output `[B, H, S, D_v]`, or `(output, lse)` with lse float32 `[B, H, S]`. A query that sees
        nothing (by `attn_mask`) gives 0 and -inf.

    Raises:
        GridError: If a sequence does not have the grid's length.
        ConfigError: If shapes, settings or the backend's name do not fit.
        UnsupportedError: If the backend that was asked for can't run the call.
    """
    layout = as_grid(grid, num_prefix_tokens, num_suffix_tokens)
    pattern, offsets = window_pattern(layout, window_size, shift, strided, is_causal)
    return pattern_attention(
        query,
        key,
        value,
        pattern,
        shift=offsets,
        attn_mask=attn_mask,
        scale=scale,
        return_lse=return_lse,
        backend=backend,
    )


def branches_coincide(grid: TokenGrid | Sequence[int], window_size: PerAxis) -> bool:
    """Whether the contiguous and the strided windows of a grid are the same index sets.

    Then one of the two is enough: their mean is either of them.
    """
    layout = as_grid(grid, 0, 0)
    windows = per_axis("window_size", window_size)
    pairs = zip(layout.shape, windows, strict=True)
    return all(window >= length or window == 1 for length, window in pairs)


def pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    shift: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attend to what a pattern of a grid shows; see `window_attention`.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D_v]`.
        pattern: A product over the axes of a grid.
        shift: int64 `[3]`, in place of the shifts of the pattern.
        attn_mask: As of `window_attention`.
        scale: As of `window_attention`.
        return_lse: As of `window_attention`.
        backend: As of `window_attention`.

    Raises:
        GridError: If a sequence does not have the grid's length.
        ConfigError: If shapes or the backend's name do not fit.
        UnsupportedError: If the backend that was asked for can't run the call.
    """
    check_tensors(pattern.grid, query, key, value)
    name = forced_backend(operator_of(pattern), backend) or ""
    q, k, v = align_dtypes(query, key, value)
    mask = as_four_dims(attn_mask, q)
    if name == "reference":
        seen = pattern_mask(pattern, shift)
        out, lse = masked_attention(q, k, v, seen, attn_mask=mask, scale=scale)
        return (out, lse) if return_lse else out
    pair = _run(q, k, v, pattern, mask, shift, scale, return_lse, name)
    return pair if return_lse else pair[0]


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Run the operator, or PyTorch operations in the open where that is asked for or needed."""
    needs_grad = torch.is_grad_enabled()
    learned = needs_grad and attn_mask is not None and attn_mask.requires_grad
    in_the_open = learned or (backend == "torch" and torch.compiler.is_compiling())
    # a whole window is the dense model's own attention, bit for bit
    if pattern.is_dense and not return_lse and backend in (None, "", "torch"):
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(q.dtype)
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=gqa
        )
        return out, None
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if in_the_open:
        tables = pattern.tables(q.device, shift)
        return tiled_attention(
            q, k, v, pattern.grid, tables, attn_mask=attn_mask, scale=factor, with_lse=return_lse
        )
    needs_grad = needs_grad and (q.requires_grad or k.requires_grad or v.requires_grad)
    grid, axes = pattern.encode()
    with_lse = return_lse or needs_grad
    out, lse = grid_window(q, k, v, attn_mask, shift, grid, axes, factor, with_lse, backend)
    return out, lse
