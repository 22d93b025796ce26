"""Gradients of block-sparse attention in PyTorch operations, weights made again in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.lists import BlockLists
from retrofit.kernels.block_sparse.plain import (
    Problem,
    exact_lists,
    gather_chunks,
    softmax_and_lse,
    to_blocks,
    widen,
)


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    problem: Problem,
    block_mask: Tensor | BlockLists,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; only what is listed is computed again.

    With `delta = sum(grad_out * out) - grad_lse`, the gradient of the scores is
    `weights * (grad_out @ value.T - delta)`.

    Args:
        grad_out: Gradient of the output, `[B, H, S_q, D_v]`.
        grad_lse: Gradient of the log-sum-exp, `[B, H, S_q]`, or None.
        problem: The call.
        block_mask: Its block mask or lists.
        out: What the forward returned.

    Returns:
        Three tensors in shape and dtype of query, key and value.
    """
    p, lists = widen(problem), exact_lists(block_mask)
    dtype = p.query.dtype
    grad_out = grad_out.to(dtype)
    delta = (grad_out * out.to(dtype)).sum(dim=-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    num_q, num_k, (block_q, block_k) = p.num_query_blocks, p.num_key_blocks, p.block_size
    d_query = torch.zeros_like(to_blocks(p.query, num_q, block_q))
    d_key = torch.zeros_like(to_blocks(p.key, num_k, block_k)).flatten(0, 2).flatten(1)
    d_value = torch.zeros_like(to_blocks(p.value, num_k, block_k)).flatten(0, 2).flatten(1)
    grads = to_blocks(grad_out, num_q, block_q)
    deltas = to_blocks(delta.unsqueeze(-1), num_q, block_q)
    for chunk in gather_chunks(p, lists, is_exact=True) if lists.max_count else ():
        part = slice(chunk.start, chunk.stop)
        weights, _ = softmax_and_lse(chunk.scores)
        rows = grads[:, :, part]
        d_weights = rows @ chunk.values.transpose(-1, -2)
        d_scores = weights * (d_weights - deltas[:, :, part]) * p.scale
        d_query[:, :, part] = d_scores @ chunk.keys
        picked = chunk.picked.flatten()
        for total, left, right in ((d_value, weights, rows), (d_key, d_scores, chunk.queries)):
            grad = left.transpose(-1, -2) @ right
            total.index_add_(0, picked, grad.reshape(picked.shape[0], -1))
    return (
        _from_blocks(d_query, problem.query),
        _from_blocks(d_key.view(*p.key.shape[:2], num_k, block_k, -1), problem.key),
        _from_blocks(d_value.view(*p.value.shape[:2], num_k, block_k, -1), problem.value),
    )


def _from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """Undo `to_blocks`, in the dtype of `like` and contiguous."""
    return blocks.flatten(2, 3)[:, :, : like.shape[2]].to(like.dtype).contiguous()
