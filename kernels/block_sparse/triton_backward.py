"""Gradients through Triton on a GPU: lists turned round, settings, launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrofit.kernels._triton import capability, pad_dim, with_adjacent_channels
from retrofit.kernels._triton_launch import Launch, choose_key_launch, choose_query_launch
from retrofit.kernels.block_sparse.lists import BlockLists, count_blocks
from retrofit.kernels.block_sparse.plain import Problem
from retrofit.kernels.block_sparse.triton_route import (
    OrderedLists,
    attn_mask_arguments,
    kernel_constants,
    list_strides,
    order_lists,
)


class TurnedLists(NamedTuple):
    """Which query blocks visit each key block."""

    indices: Tensor  # int32 [B', H', n]: query blocks, those of a key block side by side
    starts: Tensor  # int32 [B', H', num_k + 1]: where those of a key block begin
    mask_ids: Tensor | None  # int32, as indices


def turn_lists(lists: OrderedLists, num_key_blocks: int) -> TurnedLists:
    """Sort the entries of lists by key block, without waiting for the device."""
    width = lists.indices.shape[-1]
    columns = torch.arange(width, device=lists.indices.device)
    valid = columns < lists.counts.unsqueeze(-1)
    blocks = torch.where(valid, lists.indices, num_key_blocks).flatten(-2)
    blocks, order = blocks.sort(dim=-1, stable=True)
    bounds = torch.arange(num_key_blocks + 1, dtype=blocks.dtype, device=blocks.device)
    bounds = bounds.expand(*blocks.shape[:-1], -1).contiguous()
    ids = lists.mask_ids
    return TurnedLists(
        (order // width).to(torch.int32),
        torch.searchsorted(blocks, bounds, out_int32=True),
        None if ids is None else ids.flatten(-2).gather(-1, order).contiguous(),
    )


def triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    problem: Problem,
    block_mask: Tensor | BlockLists,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous and in their dtypes.

    Args:
        grad_out: Gradient of the output, `[B, H, S_q, D_v]`.
        grad_lse: Gradient of the log-sum-exp, `[B, H, S_q]`, or None.
        problem: The call.
        block_mask: Its block mask or lists.
        out: What the forward returned.
        lse: Its log-sum-exp, float32, contiguous.
    """
    p = problem
    tensors = [with_adjacent_channels(x) for x in (p.query, p.key, p.value, grad_out, out)]
    if grad_lse is not None:
        grad_lse = grad_lse.to(torch.float32).contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (p.query, p.key, p.value))
    lists = order_lists(block_mask, p)
    _launch_queries(p, [*tensors, lse, grad_lse, delta, dq], lists)
    _launch_keys(p, [*tensors[:4], lse, delta, dk, dv], lists)
    return dq, dk, dv


def _launch_queries(p: Problem, tensors: list[Any], lists: OrderedLists) -> None:
    from .triton_backward_kernel import block_sparse_bwd_dq_kernel

    batch, heads, len_q, dim = p.query.shape
    dims = dim, p.value.shape[3]
    settings = pad_dim(max(dims)), p.query.element_size(), capability(p.query.device)
    launch = _fit(choose_query_launch(*settings), p.block_size)
    constants, mask, strides = _masks(p, lists, dims, launch)
    row_blocks = count_blocks(p.block_size[0], launch.block_m)
    block_sparse_bwd_dq_kernel[(row_blocks * p.num_query_blocks * heads * batch,)](
        *tensors,
        lists.indices,
        lists.counts,
        lists.mask_ids,
        lists.mask_bits,
        mask,
        *[step for x in tensors[:5] for step in x.stride()[:3]],
        *strides,
        *list_strides(lists.counts),
        lists.indices.shape[-1],
        heads,
        heads // p.key.shape[1],
        p.num_query_blocks,
        len_q,
        p.key.shape[2],
        float(p.scale),
        **constants,
        HAS_DLSE=tensors[6] is not None,
        **launch.options(),
    )


def _launch_keys(p: Problem, tensors: list[Any], lists: OrderedLists) -> None:
    from .triton_backward_kernel import block_sparse_bwd_dkv_kernel

    batch, kv_heads, len_k, dim = p.key.shape
    dims = dim, p.value.shape[3]
    settings = pad_dim(max(dims)), p.query.element_size(), capability(p.query.device)
    launch = _fit(choose_key_launch(*settings), p.block_size[::-1])
    constants, mask, strides = _masks(p, lists, dims, launch)
    turned = turn_lists(lists, p.num_key_blocks)
    row_blocks = count_blocks(p.block_size[1], launch.block_m)
    groups = p.query.shape[1] // kv_heads
    block_sparse_bwd_dkv_kernel[(row_blocks * p.num_key_blocks * kv_heads * batch,)](
        *tensors,
        turned.indices,
        turned.starts,
        _order(turned, batch, kv_heads, groups),
        turned.mask_ids,
        lists.mask_bits,
        mask,
        *[step for x in tensors[:4] for step in x.stride()[:3]],
        *strides,
        *list_strides(turned.starts, rows=1),
        turned.indices.shape[-1],
        kv_heads,
        groups,
        p.num_key_blocks,
        p.query.shape[2],
        len_k,
        float(p.scale),
        **constants,
        **launch.options(),
    )


def _masks(
    p: Problem, lists: OrderedLists, dims: tuple[int, int], launch: Launch
) -> tuple[dict[str, Any], Tensor | None, list[int]]:
    """Compile-time arguments, the attention mask and its strides."""
    kind, mask, strides = attn_mask_arguments(p.attn_mask)
    constants = {
        **kernel_constants(p.block_size, dims, launch),
        "MASK_KIND": kind,
        "MASK_WORDS": 0 if lists.mask_bits is None else lists.mask_bits.shape[-1],
        "IS_CAUSAL": p.is_causal,
    }
    return constants, mask, strides


def _fit(launch: Launch, block_size: tuple[int, ...]) -> Launch:
    """Tiles no larger than a block; rows of the program first."""
    rows, columns = (pad_dim(n) for n in block_size)
    return launch._replace(block_m=min(launch.block_m, rows), block_n=min(launch.block_n, columns))


def _order(turned: TurnedLists, batch: int, kv_heads: int, groups: int) -> Tensor:
    """Key blocks of each batch and head, those with the most visits first."""
    counts = turned.starts.diff(dim=-1)
    counts = counts.expand(batch, kv_heads * groups, -1).unflatten(1, (kv_heads, groups)).sum(2)
    return counts.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
