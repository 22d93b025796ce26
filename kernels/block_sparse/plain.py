"""Block-sparse attention in plain PyTorch operations: traceable, differentiable, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.lists import (
    BlockLists,
    count_blocks,
    list_entries_valid,
    mask_from_lists,
    unpack_mask_bits,
)

# Scores held at once. Small enough for a last-level cache, large enough for an efficient product.
CHUNK_BYTES = 16 * 2**20


def attend_plain(
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
    """Attend chunk by chunk; nothing of size `S_q x S_k` is held.

    Lists are gathered, so the work follows `max_count`; a bool mask, whose largest row is not known
    without waiting for the device, is applied to dense scores. Arithmetic is in float32 for half
    precision.

    Returns:
        Output `[B, H, S_q, D_v]` in the dtype of `value`, and log-sum-exp `[B, H, S_q]`.
    """
    dtype = value.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (x.to(wide) for x in (query, key, value))
    if isinstance(block_mask, BlockLists) and not _is_worth_gathering(block_mask, attn_mask, key):
        block_mask = mask_from_lists(block_mask, count_blocks(key.shape[2], block_size[1]))
    options = block_size, attn_mask, is_causal, scale
    if isinstance(block_mask, BlockLists):
        out, lse = _attend_gathered(query, key, value, block_mask, *options)
    else:
        out, lse = _attend_masked(query, key, value, block_mask, *options)
    return out.to(dtype), lse


def _is_worth_gathering(lists: BlockLists, attn_mask: Tensor | None, key: Tensor) -> bool:
    """Whether lists should be gathered: always where only they can say what is seen."""
    if lists.mask_ids is not None:
        return True
    return lists.max_count * 2 <= key.shape[2]


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the last axis; a row of -inf gives weights 0."""
    lse = scores.logsumexp(dim=-1)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return (scores - finite.unsqueeze(-1)).exp(), lse


def _rows_of(mask: Tensor, start: int, stop: int) -> Tensor:
    """Rows of an attention mask whose query axis may be broadcast."""
    return mask if mask.shape[-2] == 1 else mask[..., start:stop, :]


def _apply_mask(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def _attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: tuple[int, int],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (batch, heads, len_q, _), (_, kv_heads, len_k, _) = query.shape, key.shape
    block_q, block_k = block_size
    keys_t = key.transpose(-1, -2)
    step = block_q * max(1, CHUNK_BYTES // (4 * batch * heads * len_k * block_q))
    columns = torch.arange(len_k, device=query.device)
    outs, lses = [], []
    for start in range(0, len_q, step):
        rows = query[:, :, start : start + step]
        num_rows = rows.shape[2]
        # heads that share keys are stacked as rows of one product: [B, H_kv, G * rows, D]
        stacked = rows.reshape(batch, kv_heads, -1, rows.shape[-1])
        scores = (stacked @ keys_t * scale).view(batch, heads, num_rows, len_k)
        if attn_mask is not None:
            scores = _apply_mask(scores, _rows_of(attn_mask, start, start + num_rows))
        position = torch.arange(start, start + num_rows, device=query.device)
        kept = block_mask[:, :, start // block_q : (start + num_rows - 1) // block_q + 1]
        visible = kept[:, :, (position - start) // block_q][..., columns // block_k]
        if is_causal:
            visible = visible & (columns <= position.unsqueeze(-1))
        weights, lse = _softmax(scores.masked_fill(~visible, float("-inf")))
        out = weights.reshape(batch, kv_heads, -1, len_k) @ value
        outs.append(out.view(batch, heads, num_rows, value.shape[-1]))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    block_size: tuple[int, int],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (batch, heads, len_q, dim), (_, kv_heads, len_k, _) = query.shape, key.shape
    block_q, block_k = block_size
    num_q, num_k = count_blocks(len_q, block_q), count_blocks(len_k, block_k)
    width = lists.max_count * block_k
    if width == 0:
        empty = query.new_zeros(batch, heads, len_q, value.shape[-1])
        return empty, query.new_full((batch, heads, len_q), float("-inf"))
    blocks = _to_blocks(query, num_q, block_q)  # [B, H, n_q, bq, D]
    k_blocks = _to_blocks(key, num_k, block_k).flatten(3)  # [B, H_kv, n_k, bk * D]
    v_blocks = _to_blocks(value, num_k, block_k).flatten(3)
    indices = lists.indices.expand(batch, heads, -1, -1).long()
    valid = list_entries_valid(lists)
    kv_head = torch.arange(heads, device=query.device) // (heads // kv_heads)
    b_index = torch.arange(batch, device=query.device)[:, None, None, None]
    h_index = kv_head[None, :, None, None]
    step = max(1, CHUNK_BYTES // (4 * batch * heads * width * (block_q + 2 * dim)))
    outs, lses = [], []
    for start in range(0, num_q, step):
        stop = min(start + step, num_q)
        picked = indices[:, :, start:stop]
        keys = k_blocks[b_index, h_index, picked].view(*picked.shape[:3], width, dim)
        values = v_blocks[b_index, h_index, picked].view(*picked.shape[:3], width, -1)
        scores = blocks[:, :, start:stop] @ keys.transpose(-1, -2) * scale
        offset = torch.arange(block_k, device=query.device)
        columns = (picked.unsqueeze(-1) * block_k + offset).flatten(3)  # [B, H, c, width]
        seen = valid[:, :, start:stop].repeat_interleave(block_k, dim=-1)
        visible = (seen & (columns < len_k)).unsqueeze(3)
        position = torch.arange(start * block_q, stop * block_q, device=query.device)
        position = position.view(-1, block_q)
        if is_causal:
            visible = visible & (columns.unsqueeze(3) <= position.unsqueeze(-1))
        if lists.mask_ids is not None and lists.mask_bits is not None:
            visible = visible & _entry_masks(lists, start, stop, block_k)
        if attn_mask is not None:
            scores = _apply_mask(scores, _gather_mask(attn_mask, position, columns, len_q, len_k))
        weights, lse = _softmax(scores.masked_fill(~visible, float("-inf")))
        outs.append(weights @ values)
        lses.append(lse)
    out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
    return out.flatten(2, 3)[:, :, :len_q], lse.flatten(2, 3)[:, :, :len_q]


def _to_blocks(x: Tensor, num_blocks: int, block: int) -> Tensor:
    padding = num_blocks * block - x.shape[2]
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    return x.unflatten(2, (num_blocks, block))


def _entry_masks(lists: BlockLists, start: int, stop: int, block_k: int) -> Tensor:
    """What each row sees of its listed blocks, bool `[B', H', c, block_q, max * block_k]`."""
    assert lists.mask_ids is not None
    assert lists.mask_bits is not None
    ids = lists.mask_ids[:, :, start:stop]
    masks = unpack_mask_bits(lists.mask_bits, block_k)[ids.clamp(min=0).long()]
    masks = masks | (ids < 0)[..., None, None]
    return masks.transpose(3, 4).flatten(4)


def _gather_mask(mask: Tensor, position: Tensor, columns: Tensor, len_q: int, len_k: int) -> Tensor:
    """Attention mask of the gathered keys, `[B, H, c, block_q or 1, width]`."""
    batch, heads = columns.shape[:2]
    device = mask.device
    b_index = torch.arange(batch, device=device) if mask.shape[0] > 1 else mask.new_zeros(1).long()
    h_index = torch.arange(heads, device=device) if mask.shape[1] > 1 else mask.new_zeros(1).long()
    rows = position if mask.shape[2] > 1 else torch.zeros_like(position[:, :1])
    cols = columns if mask.shape[3] > 1 else torch.zeros_like(columns)
    return mask[
        b_index[:, None, None, None, None],
        h_index[None, :, None, None, None],
        rows.clamp(max=len_q - 1)[None, None, :, :, None],
        cols.clamp(max=len_k - 1)[:, :, :, None, :],
    ]
