"""Block-sparse attention in plain PyTorch operations: traceable, on any device, in small chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.lists import (
    BlockLists,
    count_blocks,
    list_entries_valid,
    lists_from_mask,
    mask_from_lists,
    unpack_mask_bits,
)

# Scores held at once. Small enough for a last-level cache, large enough for an efficient product.
CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call, its tensors in the dtype of the arithmetic."""

    query: Tensor
    key: Tensor
    value: Tensor
    block_size: tuple[int, int]
    attn_mask: Tensor | None
    is_causal: bool
    scale: float

    @property
    def num_query_blocks(self) -> int:
        """Query blocks, the last one maybe short."""
        return count_blocks(self.query.shape[2], self.block_size[0])

    @property
    def num_key_blocks(self) -> int:
        """Key blocks, the last one maybe short."""
        return count_blocks(self.key.shape[2], self.block_size[1])


def widen(problem: Problem) -> Problem:
    """The same with half precision raised to float32."""
    dtype = torch.promote_types(problem.value.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (problem.query, problem.key, problem.value))
    return replace(problem, query=query, key=key, value=value)


def new_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output as `scaled_dot_product_attention` lays it out, and log-sum-exp, not filled."""
    batch, heads, len_q, _ = query.shape
    out = value.new_empty(batch, len_q, heads, value.shape[3]).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(batch, heads, len_q, dtype=wide)


def attend_plain(problem: Problem, block_mask: Tensor | BlockLists) -> tuple[Tensor, Tensor]:
    """Attend chunk by chunk; nothing of size `S_q x S_k` is held.

    Lists are gathered, so the work follows `max_count`; a bool mask, whose largest row is not known
    without waiting for the device, is applied to dense scores. Arithmetic is in float32 for half
    precision.

    Returns:
        Output `[B, H, S_q, D_v]` in the dtype of `value`, and log-sum-exp `[B, H, S_q]`.
    """
    wide = widen(problem)
    if isinstance(block_mask, BlockLists) and _is_worth_gathering(block_mask, wide):
        out, lse = _attend_gathered(wide, block_mask)
    else:
        if isinstance(block_mask, BlockLists):
            block_mask = mask_from_lists(block_mask, wide.num_key_blocks)
        out, lse = _attend_masked(wide, block_mask)
    return out.to(problem.value.dtype), lse


def _is_worth_gathering(lists: BlockLists, problem: Problem) -> bool:
    """Whether lists should be gathered: always where only they can say what is seen."""
    return lists.mask_ids is not None or lists.max_count * 2 <= problem.num_key_blocks


def exact_lists(block_mask: Tensor | BlockLists) -> BlockLists:
    """Lists no wider than the longest row; waits for the device."""
    if isinstance(block_mask, BlockLists):
        return block_mask
    longest = int(block_mask.sum(dim=-1).max()) if block_mask.numel() else 0
    return lists_from_mask(block_mask, max_count=longest)


def counted_rows(batch: int) -> int:
    """Rows that the size of a chunk goes by; one in traced code, whose batch may be symbolic."""
    return 1 if torch.compiler.is_compiling() else batch


def softmax_and_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the last axis; a row of -inf gives weights 0.

    Weights are divided by their sum, not made from the log-sum-exp, in which a row of very low
    scores (masks add the lowest finite number) loses the logarithm of its length.
    """
    top = scores.amax(dim=-1, keepdim=True).detach()
    sees_none = top == float("-inf")
    top = top.masked_fill(sees_none, 0.0)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True).masked_fill(sees_none, 1.0)
    lse = (top + total.log()).masked_fill(sees_none, float("-inf"))
    return weights / total, lse.squeeze(-1)


def _apply_mask(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def _attend_masked(p: Problem, block_mask: Tensor) -> tuple[Tensor, Tensor]:
    (batch, heads, len_q, _), (_, kv_heads, len_k, dim_v) = p.query.shape, p.value.shape
    block_q, block_k = p.block_size
    keys_t = p.key.transpose(-1, -2)
    step = block_q * max(1, CHUNK_BYTES // (4 * counted_rows(batch) * heads * len_k * block_q))
    columns = torch.arange(len_k, device=p.query.device)
    outs, lses = [], []
    for start in range(0, len_q, step):
        rows = p.query[:, :, start : start + step]
        num_rows = rows.shape[2]
        # heads that share keys are stacked as rows of one product: [B, H_kv, G * rows, D]
        stacked = rows.reshape(batch, kv_heads, -1, rows.shape[-1])
        scores = (stacked @ keys_t * p.scale).view(batch, heads, num_rows, len_k)
        if p.attn_mask is not None:
            mask = p.attn_mask
            scores = _apply_mask(
                scores, mask if mask.shape[2] == 1 else mask[:, :, start : start + num_rows]
            )
        position = torch.arange(start, start + num_rows, device=p.query.device)
        kept = block_mask[:, :, start // block_q : (start + num_rows - 1) // block_q + 1]
        visible = kept[:, :, (position - start) // block_q][..., columns // block_k]
        if p.is_causal:
            visible = visible & (columns <= position.unsqueeze(-1))
        weights, lse = softmax_and_lse(scores.masked_fill(~visible, float("-inf")))
        out = weights.reshape(batch, kv_heads, -1, len_k) @ p.value
        outs.append(out.view(batch, heads, num_rows, dim_v))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


class Chunk(NamedTuple):
    """Some query blocks with the keys that they visit.

    Attributes:
        start: First query block.
        stop: One past the last query block.
        queries: `[B, H, c, block_q, D]`.
        keys: `[B, H, c, width, D]`.
        values: `[B, H, c, width, D_v]`.
        scores: Scaled and masked, `[B, H, c, block_q, width]`.
        picked: Row of the flattened key blocks that each listed block is, `[B, H, c, max]`.
    """

    start: int
    stop: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    picked: Tensor


def gather_chunks(p: Problem, lists: BlockLists, *, is_exact: bool = False) -> Iterator[Chunk]:
    """Walk the query blocks, some at a time.

    Args:
        p: The call.
        lists: At least one entry wide.
        is_exact: Cut each chunk to its longest row, which waits for the device.
    """
    (batch, heads, len_q, dim), (_, kv_heads, len_k, _) = p.query.shape, p.key.shape
    block_q, block_k = p.block_size
    num_q, num_k = p.num_query_blocks, p.num_key_blocks
    blocks = to_blocks(p.query, num_q, block_q)
    k_blocks = to_blocks(p.key, num_k, block_k).flatten(0, 2).flatten(1)  # [B H_kv n_k, bk D]
    v_blocks = to_blocks(p.value, num_k, block_k).flatten(0, 2).flatten(1)
    indices = lists.indices.expand(batch, heads, -1, -1).long()
    valid = list_entries_valid(lists)
    device = p.query.device
    head = torch.arange(heads, device=device) // (heads // kv_heads)
    row = torch.arange(batch, device=device)[:, None] * kv_heads + head
    first_row = (row * num_k)[..., None, None]
    offset = torch.arange(block_k, device=device)
    row_bytes = 4 * counted_rows(batch) * heads * lists.max_count * block_k * (block_q + 2 * dim)
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, num_q, step):
        stop = min(start + step, num_q)
        listed, seen = indices[:, :, start:stop], valid[:, :, start:stop]
        if is_exact:
            longest = max(1, int(lists.counts[:, :, start:stop].max()))
            listed, seen = listed[..., :longest], seen[..., :longest]
        width = listed.shape[3] * block_k
        picked = first_row + listed
        keys = k_blocks[picked].view(*listed.shape[:3], width, dim)
        values = v_blocks[picked].view(*listed.shape[:3], width, -1)
        queries = blocks[:, :, start:stop]
        scores = queries @ keys.transpose(-1, -2) * p.scale
        columns = (listed.unsqueeze(-1) * block_k + offset).flatten(3)  # [B, H, c, width]
        visible = (seen.repeat_interleave(block_k, dim=-1) & (columns < len_k)).unsqueeze(3)
        position = torch.arange(start * block_q, stop * block_q, device=device)
        position = position.view(-1, block_q)
        if p.is_causal:
            visible = visible & (columns.unsqueeze(3) <= position.unsqueeze(-1))
        if lists.mask_ids is not None:
            visible = visible & _entry_masks(lists, start, stop, listed.shape[3], block_k)
        if p.attn_mask is not None:
            mask = _gather_mask(p.attn_mask, position, columns, len_q, len_k)
            scores = _apply_mask(scores, mask)
        scores = scores.masked_fill(~visible, float("-inf"))
        yield Chunk(start, stop, queries, keys, values, scores, picked)


def _attend_gathered(
    p: Problem, lists: BlockLists, *, is_exact: bool = False
) -> tuple[Tensor, Tensor]:
    batch, heads, len_q, _ = p.query.shape
    if lists.max_count == 0:
        empty = p.query.new_zeros(batch, heads, len_q, p.value.shape[3])
        return empty, p.query.new_full((batch, heads, len_q), float("-inf"))
    outs, lses = [], []
    for chunk in gather_chunks(p, lists, is_exact=is_exact):
        weights, lse = softmax_and_lse(chunk.scores)
        outs.append(weights @ chunk.values)
        lses.append(lse)
    out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
    return out.flatten(2, 3)[:, :, :len_q], lse.flatten(2, 3)[:, :, :len_q]


def attend_eagerly(problem: Problem, block_mask: Tensor | BlockLists) -> tuple[Tensor, Tensor]:
    """`attend_plain` where waiting for the device is fine: only what is listed is computed.

    Results have the layout of `new_results`.
    """
    wide = widen(problem)
    made, made_lse = _attend_gathered(wide, exact_lists(block_mask), is_exact=True)
    out, lse = new_results(problem.query, problem.value)
    return out.copy_(made), lse.copy_(made_lse)


def to_blocks(x: Tensor, num_blocks: int, block: int) -> Tensor:
    """Cut a sequence into blocks, the last one padded with zeros: `[B, H, n, block, D]`."""
    padding = num_blocks * block - x.shape[2]
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    return x.unflatten(2, (num_blocks, block))


def _entry_masks(lists: BlockLists, start: int, stop: int, width: int, block_k: int) -> Tensor:
    """What each row sees of its listed blocks, bool `[B', H', c, block_q, width * block_k]`."""
    assert lists.mask_ids is not None
    assert lists.mask_bits is not None
    ids = lists.mask_ids[:, :, start:stop, :width]
    masks = unpack_mask_bits(lists.mask_bits, block_k)[ids.clamp(min=0).long()]
    masks = masks | (ids < 0)[..., None, None]
    return masks.transpose(3, 4).flatten(4)


def _gather_mask(mask: Tensor, position: Tensor, columns: Tensor, len_q: int, len_k: int) -> Tensor:
    """Attention mask of the gathered keys, `[B, H, c, block_q or 1, width]`."""
    batch, heads = columns.shape[:2]
    device = mask.device
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    b_index = torch.arange(batch, device=device) if mask.shape[0] > 1 else zero
    h_index = torch.arange(heads, device=device) if mask.shape[1] > 1 else zero
    rows = position if mask.shape[2] > 1 else torch.zeros_like(position[:, :1])
    cols = columns if mask.shape[3] > 1 else torch.zeros_like(columns)
    return mask[
        b_index[:, None, None, None, None],
        h_index[None, :, None, None, None],
        rows.clamp(max=len_q - 1)[None, None, :, :, None],
        cols.clamp(max=len_k - 1)[:, :, :, None, :],
    ]
