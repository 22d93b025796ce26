"""The fast PyTorch routes on a CPU, where waiting for a list costs nothing: no compiler needed."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.lists import BlockLists, mask_from_lists
from retrofit.kernels.block_sparse.plain import (
    Problem,
    attend_eagerly,
    new_results,
    to_blocks,
    widen,
)

# Keys, values and scores of one product: what stays in a core's share of the cache.
CHUNK_BYTES = 8 * 2**20


def attend_on_cpu(problem: Problem, block_mask: Tensor | BlockLists) -> tuple[Tensor, Tensor]:
    """Attend with products per query block (float32) or per chunk of query blocks (bfloat16).

    Calls with more than a mask over keys take the general chunked route. float16 is computed in
    float32: PyTorch's products are slow in it on a CPU.

    Returns:
        Output `[B, H, S_q, D_v]` in the dtype of `value`, and log-sum-exp `[B, H, S_q]`.
    """
    p = problem
    by_row = p.attn_mask is not None and p.attn_mask.shape[2] > 1
    lists = block_mask if isinstance(block_mask, BlockLists) else None
    if by_row or p.is_causal or (lists is not None and lists.mask_ids is not None):
        return attend_eagerly(p, block_mask)
    if isinstance(block_mask, BlockLists):
        kept = mask_from_lists(block_mask, p.num_key_blocks)
    else:
        kept = block_mask
    kept = kept.expand(p.query.shape[0], p.query.shape[1], -1, -1)
    if p.value.dtype == torch.bfloat16:
        return _attend_chunks(p, kept)
    if p.value.dtype == torch.float16:
        out, lse = _attend_rows(widen(p), kept)
        return out.half(), lse
    return _attend_rows(p, kept)


def _key_bias(p: Problem, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of each key, padding included: `[B', H', n_k, block_k]`."""
    padding = -p.key.shape[2] % p.block_size[1]
    if p.attn_mask is None and not padding:
        return None
    bias = torch.zeros(1, 1, p.key.shape[2], dtype=dtype)
    if p.attn_mask is not None:
        mask = p.attn_mask[:, :, 0]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
        bias = bias + mask.to(dtype)
    bias = torch.nn.functional.pad(bias, (0, padding), value=float("-inf"))
    return bias.unflatten(2, (-1, p.block_size[1]))


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in place where it can be, and log-sum-exp, of scores that are no longer needed."""
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    weights.mul_(torch.where(total == 0, total, total.reciprocal()))
    return weights, (top + total.log()).squeeze(-1)


def _attend_rows(p: Problem, kept: Tensor) -> tuple[Tensor, Tensor]:
    """One product per query block: its keys are gathered, nothing is padded."""
    block_q, block_k = p.block_size
    out, lse = new_results(p.query, p.value)
    bias = _key_bias(p, p.query.dtype)
    group = p.query.shape[1] // p.key.shape[1]
    for b in range(p.query.shape[0]):
        for h in range(p.query.shape[1]):
            keys, values = (
                to_blocks(x[b : b + 1, h // group : h // group + 1], p.num_key_blocks, block_k)[
                    0, 0
                ]
                for x in (p.key, p.value)
            )
            query = p.query[b, h] * p.scale
            head_bias = None if bias is None else bias[b % bias.shape[0], h % bias.shape[1]]
            for i, row in enumerate(kept[b, h]):
                picked = row.nonzero().flatten()
                part = slice(i * block_q, (i + 1) * block_q)
                scores = query[part] @ keys[picked].flatten(0, 1).t()
                if not picked.numel():
                    out[b, h, part], lse[b, h, part] = 0.0, float("-inf")
                    continue
                if head_bias is not None:
                    scores += head_bias[picked].flatten()
                weights, lse[b, h, part] = _weights(scores)
                out[b, h, part] = weights @ values[picked].flatten(0, 1)
    return out, lse


def _attend_chunks(p: Problem, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Batched products over some query blocks of a head, rows padded to the longest of them."""
    block_q, block_k = p.block_size
    out, lse = new_results(p.query, p.value)
    bias = _key_bias(p, torch.float32)
    group = p.query.shape[1] // p.key.shape[1]
    counts = kept.sum(dim=-1)
    order = torch.sort(kept.to(torch.int8), dim=-1, descending=True, stable=True).indices
    for b in range(p.query.shape[0]):
        for h in range(p.query.shape[1]):
            keys, values = (
                to_blocks(x[b : b + 1, h // group : h // group + 1], p.num_key_blocks, block_k)[
                    0, 0
                ]
                for x in (p.key, p.value)
            )
            query = to_blocks(p.query[b : b + 1, h : h + 1], p.num_query_blocks, block_q)[0, 0]
            head_bias = None if bias is None else bias[b % bias.shape[0], h % bias.shape[1]]
            start = 0
            while start < p.num_query_blocks:
                stop, longest = _chunk_end(counts[b, h], start, p.block_size)
                picked = order[b, h, start:stop, :longest]
                shown = torch.arange(longest) < counts[b, h, start:stop, None]
                result = _attend_chunk(
                    query[start:stop], keys, values, picked, shown, head_bias, p.scale
                )
                part = slice(start * block_q, stop * block_q)
                length = out[b, h, part].shape[0]
                out[b, h, part] = result[0].flatten(0, 1)[:length]
                lse[b, h, part] = result[1].flatten(0, 1)[:length]
                start = stop
    return out, lse


def _chunk_end(counts: Tensor, start: int, block_size: tuple[int, int]) -> tuple[int, int]:
    """Where a chunk that begins at `start` ends, and its longest row."""
    longest, stop = 0, start
    block_bytes = 4 * block_size[0] * block_size[1]
    for count in counts[start:].tolist():
        wider = max(longest, count)
        if stop > start and wider * (stop + 1 - start) * block_bytes > CHUNK_BYTES:
            break
        longest, stop = wider, stop + 1
    return stop, longest


def _attend_chunk(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    picked: Tensor,
    shown: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Query blocks `[c, block_q, D]` over key blocks `picked` `[c, longest]` where `shown`."""
    count, longest = picked.shape
    if not longest:
        empty = query.new_zeros(*query.shape[:2], values.shape[2])
        return empty, query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    scores = torch.bmm(query, keys[picked].flatten(1, 2).transpose(1, 2)).float().mul_(scale)
    if bias is not None:
        scores += bias[picked].flatten(1).unsqueeze(1)
    if not bool(shown.all()):
        hidden = (~shown).repeat_interleave(keys.shape[1], dim=1)
        scores.masked_fill_(hidden.unsqueeze(1), float("-inf"))
    weights, lse = _weights(scores)
    return torch.bmm(weights.to(values.dtype), values[picked].flatten(1, 2)), lse
