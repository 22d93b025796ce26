"""The definition: masks of `[N, N]` and dense attention under them. For tests and small inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.plain import softmax_and_lse
from retrofit.layout.grid import TokenGrid, place_of

from .arguments import as_grid
from .pattern import Pattern, neighborhood_pattern, window_pattern


def pattern_mask(pattern: Pattern, shift: Tensor | None = None) -> Tensor:
    """Which keys (columns) each query (rows) sees, bool `[S, S]` on the CPU.

    Args:
        pattern: A product over the axes of its grid; special tokens see all and are seen by all.
        shift: int64 `[3]`, in place of the shifts of the settings.
    """
    place = torch.arange(pattern.grid.num_tokens)
    (of_query, is_query), (of_key, is_key) = (
        place_of(pattern.grid, x) for x in (place[:, None], place)
    )
    return pattern.sees(of_query, of_key, shift) | ~is_query | ~is_key


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
    return pattern_mask(neighborhood_pattern(layout, window_size, stride, dilation, is_causal))


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
    pattern, offsets = window_pattern(layout, window_size, shift, strided, is_causal)
    return pattern_mask(pattern, offsets)


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
