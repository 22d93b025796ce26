"""The definition of block-sparse attention: dense attention with a mask. Small inputs only."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.lists import BlockLists, mask_from_lists, unpack_mask_bits


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


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor | BlockLists,
    *,
    block_size: tuple[int, int],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend with an explicit `S_q x S_k` mask.

    Arguments are those of `block_sparse_attention`; the dtype of the inputs is the dtype of the
    arithmetic (give float64 to judge others by it).

    Returns:
        Output `[B, H, S_q, D_v]` and natural log-sum-exp `[B, H, S_q]`.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    lengths = query.shape[2], key.shape[2]
    visible = expand_block_mask(block_mask, block_size, lengths)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    if is_causal:
        visible = visible & torch.ones(lengths, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    # a row that sees nothing has lse -inf: give it weights 0 instead of NaN
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return (scores - finite.unsqueeze(-1)).exp() @ value, lse
