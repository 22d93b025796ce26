"""The fast PyTorch route on a CPU, where waiting for a list costs nothing: no compiler needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.lists import BlockLists, count_blocks, mask_from_lists
from retrofit.kernels.block_sparse.plain import Problem, attend_eagerly, new_results, to_blocks

CHUNK_BYTES = 2**20  # scores of one product: with keys and values they stay in a cache
# A product in bfloat16 rounds a score of 8 by up to 2^-6, and so a weight by 1.6%. Over many rows
# and small scores that averages out; beyond either limit scores are made with their remainder.
MAX_ROUNDED_SCORE = 8.0
MIN_ROUNDED_ROWS = 64
SAMPLED = 8  # every how many rows are looked at
# Within these bounds a sum of powers of two has lost nothing to overflow or underflow.
LEAST_SUM, MOST_SUM = 2.0**-60, 2.0**60
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


def attend_on_cpu(
    problem: Problem, block_mask: Tensor | BlockLists, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Gather the keys of some query blocks, then two products and a softmax.

    Calls with more than a mask over keys take the general chunked route. float16 is computed in
    float32: PyTorch's products are slow in it on a CPU. In bfloat16 weights are rounded, and scores
    where they are many and small.

    Returns:
        Output `[B, H, S_q, D_v]` in the dtype of `value`, and log-sum-exp `[B, H, S_q]` or None.
    """
    p = problem
    by_row = p.attn_mask is not None and p.attn_mask.shape[2] > 1
    lists = block_mask if isinstance(block_mask, BlockLists) else None
    if by_row or p.is_causal or (lists is not None and lists.mask_ids is not None):
        return attend_eagerly(p, block_mask)
    if isinstance(block_mask, BlockLists):
        block_mask = mask_from_lists(block_mask, p.num_key_blocks)
    batch, heads, kv_heads = *p.query.shape[:2], p.key.shape[1]
    kept = block_mask.expand(batch, heads, -1, -1)
    bias = _key_bias(p)
    rooms: dict[str, Tensor] = {}
    out, lse = new_results(p.query, p.value)
    for b in range(batch):
        for kv_head in range(kv_heads):
            keys, values = (_rows(x[b, kv_head], p.block_size[1]) for x in (p.key, p.value))
            for h in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
                query = _wide(p.query[b, h])
                head = _Head(
                    query=query if p.scale else query * 0,
                    keys=keys,
                    values=values,
                    bias=None if bias is None else bias[b % bias.shape[0], h % bias.shape[1]],
                    block_size=p.block_size,
                    scale=p.scale or 1.0,  # a product with factor 0 is not made at all
                    rooms=rooms,
                )
                head.attend(kept[b, h], out[b, h], lse[b, h] if with_lse else None)
    return out, lse if with_lse else None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _rows(x: Tensor, block: int) -> Tensor:
    """Blocks as contiguous rows: `[n_k, block * D]`."""
    blocks = to_blocks(_wide(x)[None, None], count_blocks(x.shape[0], block), block)
    return blocks[0, 0].flatten(1).contiguous()


def _key_bias(p: Problem) -> Tensor | None:
    """What is added to the scores of each key, padding included: `[B', H', n_k, block_k]`."""
    padding = -p.key.shape[2] % p.block_size[1]
    if p.attn_mask is None and not padding:
        return None
    dtype = torch.promote_types(p.query.dtype, torch.float32)
    bias = torch.zeros(1, 1, p.key.shape[2], dtype=dtype)
    if p.attn_mask is not None:
        mask = p.attn_mask[:, :, 0]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
        bias = bias + mask.to(dtype)
    bias = torch.nn.functional.pad(bias, (0, padding), value=float("-inf"))
    return bias.unflatten(2, (-1, p.block_size[1]))


class _Head:
    """One query head; `query` is `[S_q, D]`."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        block_size: tuple[int, int],
        scale: float,
        rooms: dict[str, Tensor],
    ) -> None:
        """Keep what the products need; `rooms` is memory shared with the other heads."""
        self.scale = scale
        self.block_q, self.block_k = block_size
        self.len_q, self.dim = query.shape
        self.num_q = count_blocks(self.len_q, self.block_q)
        self.queries = to_blocks(query[None, None], self.num_q, self.block_q)[0, 0].contiguous()
        self.keys, self.values, self.bias = keys, values, bias
        self.dim_v = values.shape[1] // self.block_k
        self.rooms = rooms

    def attend(self, kept: Tensor, out: Tensor, lse: Tensor | None) -> None:
        """Fill `out` `[S_q, D_v]` and `lse` `[S_q]`; `kept` is `[n_q, n_k]`."""
        counts = kept.sum(dim=-1).tolist()
        listed = kept.nonzero()[:, 1]
        start = at = 0
        while start < self.num_q:
            stop, each = self._chunk_end(counts, start), counts[start]
            rows = slice(start * self.block_q, min(stop * self.block_q, self.len_q))
            if each:
                picked = listed[at : at + each * (stop - start)]
                made, logs = self._attend_chunk(start, stop, picked, with_lse=lse is not None)
                length = rows.stop - rows.start
                out[rows] = made[:length]
                if lse is not None:
                    lse[rows] = logs[:length]
            else:
                out[rows] = 0
                if lse is not None:
                    lse[rows] = float("-inf")
            start, at = stop, at + each * (stop - start)

    def _chunk_end(self, counts: list[int], start: int) -> int:
        """Where a chunk that begins at `start` ends: rows of one length that fit."""
        block_bytes = self.block_q * self.block_k * self.queries.element_size()
        room = max(1, CHUNK_BYTES // max(1, counts[start] * block_bytes))
        stop = start + 1
        while stop < len(counts) and stop - start < room and counts[stop] == counts[start]:
            stop += 1
        return stop

    def _attend_chunk(
        self, start: int, stop: int, picked: Tensor, *, with_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend from some query blocks, each to as many of the blocks in `picked`.

        Returns:
            Output `[rows, D_v]`, and log-sum-exp `[rows]` if asked for.
        """
        count, width = stop - start, picked.numel() // (stop - start) * self.block_k
        keys = self._room("gathered", picked.numel(), self.block_k * self.dim)
        torch.index_select(self.keys, 0, picked, out=keys)
        scored = self.queries[start:stop], keys.view(count, width, -1).transpose(1, 2), picked
        is_fused = self.values.dtype == torch.bfloat16  # several passes cost more there than one
        weigh = self._softmax if is_fused else self._powers
        weights, sums, logs = weigh(*scored, with_lse=with_lse)
        values = self._room("gathered", picked.numel(), self.block_k * self.dim_v)
        torch.index_select(self.values, 0, picked, out=values)
        made = self._room("made", count, self.block_q, self.dim_v)
        torch.bmm(weights, values.view(count, width, self.dim_v), out=made)
        if sums is not None:
            made *= sums.reciprocal().masked_fill_(sums == 0, 0.0)
        return made.flatten(0, 1), logs.flatten()

    def _softmax(
        self, queries: Tensor, keys_t: Tensor, picked: Tensor, *, with_lse: bool
    ) -> tuple[Tensor, None, Tensor]:
        """Weights that add up to 1, and log-sum-exp if asked for."""
        scores = self._score(queries, keys_t, picked, 1.0)
        logs = scores.float().logsumexp(dim=-1) if with_lse else scores.new_empty(0)
        sees_none = None
        if self.bias is not None:  # a row of -inf has no softmax
            sees_none = scores.amax(dim=-1, keepdim=True) == float("-inf")
        weights = self._room("weights", *scores.shape)
        if scores.dtype == weights.dtype:
            torch.softmax(scores, dim=-1, out=weights)
        else:
            weights.copy_(scores.softmax(dim=-1))
        if sees_none is not None:
            weights.masked_fill_(sees_none, 0.0)
        return weights, None, logs

    def _powers(
        self, queries: Tensor, keys_t: Tensor, picked: Tensor, *, with_lse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, what they add up to (`[count, block_q, 1]`, 0 where nothing is seen), and lse.

        The largest score of a row is taken off only where some sum shows that it had to be: nearly
        never, and looking for it costs as much as the powers of two.
        """
        weights = self._score(queries, keys_t, picked, LOG2E).exp2_()
        sums, tops = weights.sum(dim=-1, keepdim=True), torch.zeros((), dtype=weights.dtype)
        fits = (sums > LEAST_SUM) & (sums < MOST_SUM)
        if not fits.all():
            scores = self._score(queries, keys_t, picked, LOG2E)
            tops = scores.amax(dim=-1, keepdim=True)
            # a row that fits stays as it is, whatever lies beside it
            tops = tops.masked_fill(fits | (tops == float("-inf")), 0.0)
            weights = scores.sub_(tops).exp2_()
            sums = weights.sum(dim=-1, keepdim=True)
        return weights, sums, (sums.log2() + tops) * LN2

    def _score(self, queries: Tensor, keys_t: Tensor, picked: Tensor, unit: float) -> Tensor:
        """Scores times `unit`, `[count, block_q, width]`; may be written over."""
        scores = self._room("scores", *queries.shape[:2], keys_t.shape[2])
        # the scale within the product: bfloat16 queries times a scale would be rounded
        factor = self.scale * unit
        torch.baddbmm(scores, queries, keys_t, beta=0, alpha=factor, out=scores)
        if self._is_too_coarse(scores):
            # with the rounded product taken off, the same product leaves what rounding lost
            rest = torch.baddbmm(scores, queries, keys_t, beta=-1, alpha=factor)
            scores = scores.float().add_(rest)
        if self.bias is None:
            return scores
        return scores + (self.bias[picked] * unit).view(len(queries), 1, -1)

    def _is_too_coarse(self, scores: Tensor) -> bool:
        """Whether scores in bfloat16 would make a result worse than rounding its weights does."""
        if scores.dtype != torch.bfloat16:
            return False
        if self.len_q < MIN_ROUNDED_ROWS:
            return True
        least, most = torch.aminmax(scores[:, ::SAMPLED])
        return max(-float(least), float(most)) > MAX_ROUNDED_SCORE

    def _room(self, name: str, *sizes: int) -> Tensor:
        """Memory that is used again: fresh pages would cost as much as what is written there."""
        size = math.prod(sizes)
        room = self.rooms.get(name)
        if room is None or room.numel() < size:
            room = self.rooms[name] = self.queries.new_empty(size)
        return room[:size].view(sizes)
