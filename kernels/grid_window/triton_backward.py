"""Gradients through Triton on a GPU: launches and their settings."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels._triton import capability, with_adjacent_channels
from retrofit.kernels._triton_launch import choose_key_launch, choose_query_launch

from .pattern import Pattern
from .triton_route import (
    TritonPlan,
    find_plan,
    kernel_constants,
    key_mask,
)


def triton_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, contiguous and in their dtypes.

    Args:
        dout: Gradient of the output, `[B, H, S, D_v]`.
        dlse: Gradient of the log-sum-exp, `[B, H, S]`, or None.
        q: `[B, H, S, D]`.
        k: `[B, H_kv, S, D]`.
        v: `[B, H_kv, S, D_v]`.
        out: The output.
        lse: The log-sum-exp, float32, contiguous.
        pattern: What is seen.
        attn_mask: Over keys, `[B or 1, H or 1, 1, S]`, or None.
        shift: int64 `[3]`, in place of the shifts of the pattern, or None.
        scale: Factor of the scores.
    """
    dout, q, k, v, out = [with_adjacent_channels(x) for x in (dout, q, k, v, out)]
    if dlse is not None:
        dlse = dlse.to(torch.float32).contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = [x.new_empty(x.shape) for x in (q, k, v)]
    plan = find_plan(pattern, q.device, shift)
    turned = find_plan(pattern, q.device, shift, of_keys=True)
    kinds = (False, True) if plan.special.shape[0] else (False,)
    for special_rows in kinds:
        _launch_queries(
            (q, k, v, dout, out, lse), dlse, (delta, dq), plan, special_rows, attn_mask, scale
        )
    for special_rows in kinds:
        _launch_keys((q, k, v, dout, lse, delta, dk, dv), turned, special_rows, attn_mask, scale)
    return dq, dk, dv


def _launch_queries(
    tensors: tuple[Tensor, ...],
    dlse: Tensor | None,
    results: tuple[Tensor, Tensor],
    plan: TritonPlan,
    special_rows: bool,
    attn_mask: Tensor | None,
    scale: float,
) -> None:
    from .triton_backward_kernel import grid_window_bwd_dq_kernel

    q, k, v, dout, out, _ = tensors
    batch, heads, seq_len, dim = q.shape
    dims = dim, v.shape[3]
    launch = choose_query_launch(max(dims), q.element_size(), capability(q.device))
    row_blocks = -(-plan.rows_per_tile(special_rows) // launch.block_m)
    masks, strides = key_mask(attn_mask)
    grid = (plan.num_tiles(special_rows) * row_blocks * batch * heads,)
    grid_window_bwd_dq_kernel[grid](
        *tensors,
        dlse,
        *results,
        *masks,
        *plan.arguments(special_rows),
        row_blocks,
        heads,
        heads // k.shape[1],
        seq_len,
        *[step for x in (q, k, v, dout, out) for step in x.stride()[:3]],
        *strides,
        float(scale),
        **launch.options(),
        **kernel_constants(plan, special_rows, dims, launch),
        HAS_SEEN=masks[0] is not None,
        HAS_BIAS=masks[1] is not None,
        HAS_DLSE=dlse is not None,
    )


def _launch_keys(
    tensors: tuple[Tensor, ...],
    plan: TritonPlan,
    special_rows: bool,
    attn_mask: Tensor | None,
    scale: float,
) -> None:
    from .triton_backward_kernel import grid_window_bwd_dkv_kernel

    q, k, v, dout = tensors[:4]
    batch, kv_heads, seq_len, dim = k.shape
    dims = dim, v.shape[3]
    launch = choose_key_launch(max(dims), q.element_size(), capability(q.device))
    row_blocks = -(-plan.rows_per_tile(special_rows) // launch.block_m)
    masks, strides = key_mask(attn_mask)
    grid = (plan.num_tiles(special_rows) * row_blocks * batch * kv_heads,)
    grid_window_bwd_dkv_kernel[grid](
        *tensors,
        *masks,
        *plan.arguments(special_rows),
        row_blocks,
        kv_heads,
        q.shape[1] // kv_heads,
        seq_len,
        *[step for x in (q, k, v, dout) for step in x.stride()[:3]],
        *strides,
        float(scale),
        **launch.options(),
        **kernel_constants(plan, special_rows, dims, launch),
        HAS_SEEN=masks[0] is not None,
        HAS_BIAS=masks[1] is not None,
    )
