"""The definition of block-sparse attention: dense attention with a mask. Small inputs only."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.lists import BlockLists, mask_from_lists, unpack_mask_bits
from retrofit.kernels.block_sparse.plain import Problem, softmax_and_lse


def expand_block_mask(
    block_mask: Tensor | BlockLists, block_size: tuple[int, int], lengths: tuple[int, int]
) -> Tensor:
    """Say for every query and key whether the block mask lets them meet.

    Returns:
        Bool `[B', H', S_q, S_k]`.
    """
    (block_q, block_k), (len_q, len_k) = block_size, lengths
    if not isinstance(block_mask, BlockLists):
        rows = block_mask.repeat_interleave(block_q, dim=2)[:, :, :len_q]
        return rows.repeat_interleave(block_k, dim=3)[..., :len_k]
    num_k = -(-len_k // block_k)
    kept = mask_from_lists(block_mask, num_k)
    visible = kept.unsqueeze(3).unsqueeze(-1).repeat(1, 1, 1, block_q, 1, block_k)
    if block_mask.mask_ids is not None and block_mask.mask_bits is not None:
        table = unpack_mask_bits(block_mask.mask_bits, block_k)
        for b, h, i in torch.cartesian_prod(*map(torch.arange, kept.shape[:3])).tolist():
            for n in range(int(block_mask.counts[b, h, i])):
                mask_id = int(block_mask.mask_ids[b, h, i, n])
                if mask_id >= 0:
                    visible[b, h, i, :, block_mask.indices[b, h, i, n]] = table[mask_id]
    return visible.flatten(4).flatten(2, 3)[:, :, :len_q, :len_k]


def attend_reference(problem: Problem, block_mask: Tensor | BlockLists) -> tuple[Tensor, Tensor]:
    """Attend with an explicit `S_q x S_k` mask, in the dtype of the inputs.

    Give float64 to judge others by the result.

    Returns:
        Output `[B, H, S_q, D_v]` and natural log-sum-exp `[B, H, S_q]`.
    """
    query, attn_mask = problem.query, problem.attn_mask
    group = query.shape[1] // problem.key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (problem.key, problem.value))
    scores = query @ key.transpose(-1, -2) * problem.scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    lengths = query.shape[2], key.shape[2]
    visible = expand_block_mask(block_mask, problem.block_size, lengths)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    if problem.is_causal:
        visible = visible & torch.ones(lengths, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    weights, lse = softmax_and_lse(scores)
    wide = torch.promote_types(lse.dtype, torch.float32)
    return weights.to(value.dtype) @ value, lse.to(wide)
