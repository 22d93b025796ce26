"""The operator as PyTorch sees it: one opaque node with shapes, gradients and FLOPs.

A traced graph holds `retrofit::block_sparse_attention` whatever the backend; which one runs is
decided when the node runs. It loads where retrofit is installed; `backend="torch"` leaves plain
PyTorch operations in the graph instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from retrofit.kernels._operator import (
    define_derivative,
    define_operator,
    refuse_derivative,
    without_autocast,
)
from retrofit.kernels.block_sparse.backends import run_backend, run_backward
from retrofit.kernels.block_sparse.lists import BlockLists, count_blocks, mask_from_lists
from retrofit.kernels.block_sparse.plain import Problem, new_results


def pack_blocks(block_mask: Tensor | BlockLists) -> tuple[Tensor, ...]:
    """A block mask as the operator takes it: `[mask]`, or `[indices, counts(, ids, bits)]`."""
    if not isinstance(block_mask, BlockLists):
        return (block_mask,)
    parts = block_mask.indices, block_mask.counts, block_mask.mask_ids, block_mask.mask_bits
    return tuple(x for x in parts if x is not None)


def unpack_blocks(parts: list[Tensor]) -> Tensor | BlockLists:
    """The inverse of `pack_blocks`."""
    return parts[0] if len(parts) == 1 else BlockLists(*parts)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: list[Tensor],
    attn_mask: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, S_q, D_v]` and log-sum-exp `[B, H, S_q]`, empty unless asked for."""
    problem = Problem(
        query=query,
        key=key,
        value=value,
        block_size=(block_q, block_k),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )
    with without_autocast(query.device.type):
        out, lse = run_backend(problem, unpack_blocks(blocks), with_lse=with_lse, backend=backend)
    return out, lse if with_lse and lse is not None else _no_lse(query)


def _no_lse(query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))


def _attend_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: list[Tensor],
    attn_mask: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out, lse = new_results(query, value)
    return out, lse if with_lse else _no_lse(query)


block_sparse_op = define_operator(_attend, fake=_attend_fake, name="block_sparse_attention")


def _differentiate(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: list[Tensor],
    attn_mask: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    problem = Problem(
        query=query,
        key=key,
        value=value,
        block_size=(block_q, block_k),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )
    with without_autocast(query.device.type):
        return run_backward(
            grad_out, grad_lse, problem, unpack_blocks(blocks), out, lse, backend=backend
        )


def _differentiate_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


block_sparse_backward_op = define_operator(
    _differentiate, fake=_differentiate_fake, name="block_sparse_attention_backward"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, blocks, attn_mask, *settings, with_lse, backend = inputs
    assert with_lse or not any(ctx.needs_input_grad[:3])
    ctx.save_for_backward(query, key, value, *output, attn_mask, *blocks)
    ctx.settings = (*settings, backend)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, attn_mask, *blocks = ctx.saved_tensors
    grads = block_sparse_backward_op(
        grad_out, grad_lse, query, key, value, out, lse, blocks, attn_mask, *ctx.settings
    )
    return (*grads, [None] * len(blocks), *[None] * 7)


define_derivative("block_sparse_attention", _backward, _save)
refuse_derivative("block_sparse_attention_backward")


def _count_pairs(
    query: Tensor, key: Tensor, blocks: list[Tensor], block_q: int, block_k: int
) -> int:
    """Pairs of tokens in the listed blocks.

    Without values (on meta, or while tracing) all entries of a list count, and all of a mask.
    """
    (batch, heads, len_q, _), len_k = query.shape, key.shape[2]
    block_mask = unpack_blocks(blocks)
    if any(x.device.type == "meta" or type(x) is not Tensor for x in blocks):
        width = len_k
        if isinstance(block_mask, BlockLists):
            width = block_mask.max_count * block_k
        return batch * heads * len_q * min(width, len_k)
    num_k = count_blocks(len_k, block_k)
    if isinstance(block_mask, BlockLists):
        block_mask = mask_from_lists(block_mask, num_k)
    copies = batch * heads // (block_mask.shape[0] * block_mask.shape[1])
    rows, columns = _block_lengths(len_q, block_q), _block_lengths(len_k, block_k)
    kept = block_mask.sum(dim=(0, 1)).cpu().double()
    return int(rows @ kept @ columns) * copies


def _block_lengths(length: int, block: int) -> Tensor:
    starts = torch.arange(0, length, block, dtype=torch.float64)
    return (length - starts).clamp(max=block)


@register_flop_formula(torch.ops.retrofit.block_sparse_attention, get_raw=True)
def _count_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: list[Tensor],
    attn_mask: Any,
    block_q: int,
    block_k: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two products over the pairs that are visited."""
    pairs = _count_pairs(query, key, blocks, block_q, block_k)
    return 2 * pairs * (query.shape[3] + value.shape[3])


@register_flop_formula(torch.ops.retrofit.block_sparse_attention_backward, get_raw=True)
def _count_backward_flops(
    grad_out: Any,
    grad_lse: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Any,
    lse: Any,
    blocks: list[Tensor],
    attn_mask: Any,
    block_q: int,
    block_k: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five products over the pairs that are visited."""
    pairs = _count_pairs(query, key, blocks, block_q, block_k)
    return 2 * pairs * (3 * query.shape[3] + 2 * value.shape[3])
