"""Plain PyTorch route: tiles of queries with their gathered keys, a chunk of tiles at a time.

Traceable (`fullgraph`, export), differentiable, and the only memory beside inputs and output is one
chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from retrofit.grid import TokenGrid

from .arguments import Size
from .axes import AxisTables

CHUNK_BYTES = 8 << 20


class Chunk(NamedTuple):
    """Some tiles of queries with the keys they visit, as positions in the sequence.

    Attributes:
        rows: `[c, T_q]`, `num_tokens` where the slot is padding.
        queries: The same, padding slots repeating a query.
        keys: `[c, T_k]`, special tokens last.
        visible: bool `[c, T_q, T_k]`, or None where all is seen.
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor
    visible: Tensor | None


def axis_steps(grid: TokenGrid) -> Size:
    """Distance in the sequence of neighbors on each axis."""
    return grid.num_frame_prefix_tokens + grid.height * grid.width, grid.width, 1


def first_grid_position(grid: TokenGrid) -> int:
    """Position in the sequence of the grid's first token."""
    return grid.num_prefix_tokens + grid.num_frame_prefix_tokens


def special_token_positions(grid: TokenGrid, device: torch.device) -> Tensor:
    """Positions of the special tokens, int64 `[num_special_tokens]`."""
    per_frame = grid.num_frame_prefix_tokens + grid.height * grid.width
    end = grid.num_tokens
    first = torch.arange(grid.num_prefix_tokens, device=device)
    frames = torch.arange(grid.frames, device=device)[:, None] * per_frame
    inner = frames + torch.arange(grid.num_frame_prefix_tokens, device=device)
    last = torch.arange(end - grid.num_suffix_tokens, end, device=device)
    return torch.cat([first, (inner + grid.num_prefix_tokens).flatten(), last])


def _outer_sum(axes: list[Tensor]) -> Tensor:
    """`[c, a], [c, b], [c, d]` to the sums of all combinations, `[c, a * b * d]`."""
    t, y, x = axes
    return (t[:, :, None, None] + y[:, None, :, None] + x[:, None, None, :]).flatten(1)


def _outer_and(axes: list[Tensor]) -> Tensor:
    """`[c, q, k]` per axis to the product mask, `[c, q * q * q, k * k * k]`."""
    t, y, x = axes
    mask = t[:, :, None, None, :, None, None] & y[:, None, :, None, None, :, None]
    mask = mask & x[:, None, None, :, None, None, :]
    return mask.flatten(4).flatten(1, 3)


def build_chunk(grid: TokenGrid, tables: list[AxisTables], tiles: Tensor, special: Tensor) -> Chunk:
    """Positions and mask of the tiles with these numbers (`[c]`, frames slowest)."""
    _, n_y, n_x = (table.counts[0] for table in tables)
    picks = (tiles // (n_y * n_x), tiles // n_x % n_y, tiles % n_x)
    steps = axis_steps(grid)
    queries, keys, is_query, visible = [], [], [], []
    for table, pick, step in zip(tables, picks, steps, strict=True):
        queries.append(table.queries[pick] * step)
        keys.append(table.keys[pick] * step)
        is_query.append(table.is_query[pick])
        visible.append(table.visible[pick])
    first = first_grid_position(grid)
    position = _outer_sum(queries) + first
    key_position = _outer_sum(keys) + first
    t, y, x = is_query
    valid = (t[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]).flatten(1)
    mask = None if all(table.is_full for table in tables) else _outer_and(visible)
    if grid.num_special_tokens:
        key_position = torch.cat([key_position, special.expand(tiles.shape[0], -1)], 1)
        if mask is not None:
            mask = F.pad(mask, (0, grid.num_special_tokens), value=True)
    rows = torch.where(valid, position, grid.num_tokens)
    return Chunk(rows, position, key_position, mask)


def attend(
    q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], scale: float | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of `[X, H, Q, D]` to `[X, H_kv, K, D]` under masks of `[X, 1 or H, Q or 1, K]`."""
    mask: Tensor | None = None
    for m in masks:
        if mask is None:
            mask = m
        elif mask.dtype == m.dtype == torch.bool:
            mask = mask & m
        else:
            mask = _as_bias(mask, q.dtype) + _as_bias(m, q.dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    gqa = q.shape[1] != k.shape[1]
    if not with_lse:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
        return out, None
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    grouped = (q.to(work) * factor).unflatten(1, (k.shape[1], -1))  # [X, H_kv, G, Q, D]
    scores = (grouped @ k.to(work)[:, :, None].transpose(-2, -1)).flatten(1, 2)
    if mask is not None:
        scores = scores + _as_bias(mask, work)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    out = weights.unflatten(1, (k.shape[1], -1)) @ v.to(work)[:, :, None]
    return out.flatten(1, 2).to(q.dtype), lse


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def _gather_mask(attn_mask: Tensor, rows: Tensor, keys: Tensor, heads: slice) -> Tensor:
    """Entries of `[B, H, S, S]` at `[c, Q]` x `[c, K]`, to `[B * c, 1 or h, Q or 1, K]`."""
    mask = attn_mask if attn_mask.shape[1] == 1 else attn_mask[:, heads]
    if mask.shape[2] == 1:
        picked = mask[:, :, 0, keys][:, :, :, None]
    else:
        picked = mask[:, :, rows[:, :, None], keys[:, None, :]]
    return picked.transpose(1, 2)  # [B or 1, c, 1 or h, Q or 1, K]


def _attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Chunk,
    attn_mask: Tensor | None,
    heads: slice,
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rows of one chunk for some heads: `[B, h, c * T_q, D]` and `[B, h, c * T_q]`."""
    batch = q.shape[0]
    count, n_q = chunk.queries.shape

    def gather(x: Tensor, index: Tensor) -> Tensor:
        rows = x.transpose(1, 2).index_select(1, index.flatten())
        return rows.reshape(batch * count, index.shape[1], *rows.shape[2:]).transpose(1, 2)

    masks = []
    if chunk.visible is not None:
        masks.append(chunk.visible[None, :, None].expand(batch, -1, -1, -1, -1).flatten(0, 1))
    if attn_mask is not None:
        picked = _gather_mask(attn_mask, chunk.queries, chunk.keys, heads)
        masks.append(picked.expand(batch, -1, -1, -1, -1).flatten(0, 1))
    keys = chunk.keys
    out, lse = attend(
        gather(q, chunk.queries), gather(k, keys), gather(v, keys), masks, scale, with_lse
    )
    out = out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)  # [B, h, c * T_q, D]
    if lse is not None:
        lse = lse.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
    return out, lse


def _chunk_sizes(
    q: Tensor, k: Tensor, tables: list[AxisTables], grid: TokenGrid, with_lse: bool
) -> tuple[int, int]:
    """Tiles and key heads per chunk that keep its memory near `CHUNK_BYTES`.

    Traced code counts one batch entry, so that the batch size can stay symbolic.
    """
    batch = 1 if torch.compiler.is_compiling() else q.shape[0]
    n_q = math.prod([table.counts[1] for table in tables])
    n_k = math.prod([table.counts[2] for table in tables]) + grid.num_special_tokens
    groups = q.shape[1] // k.shape[1]
    per_head = batch * (n_k + n_q * groups) * 2 * q.shape[3] * q.element_size()
    if with_lse:
        per_head += batch * groups * n_q * n_k * 8
    mask = 0 if all(table.is_full for table in tables) else batch * n_q * n_k * 5
    heads = max(1, min(k.shape[1], (CHUNK_BYTES - mask) // per_head))
    return max(1, CHUNK_BYTES // (heads * per_head + mask)), heads


def _head_slices(q: Tensor, k: Tensor, kv_heads: int) -> Iterator[tuple[slice, slice]]:
    groups = q.shape[1] // k.shape[1]
    for first in range(0, k.shape[1], kv_heads):
        last = min(first + kv_heads, k.shape[1])
        yield slice(first * groups, last * groups), slice(first, last)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    tables: list[AxisTables],
    *,
    attn_mask: Tensor | None,
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of tiles to their keys and the special tokens, and of special tokens to all.

    Args:
        q: `[B, H, S, D]`, `S = grid.num_tokens`.
        k: `[B, H_kv, S, D]`.
        v: `[B, H_kv, S, D_v]`.
        grid: Layout of the sequence.
        tables: What is seen on each axis.
        attn_mask: Rank 4, or None.
        scale: Factor of the scores, `1 / sqrt(D)` by default.
        with_lse: Also return the log-sum-exp.

    Returns:
        Output `[B, H, S, D_v]` and log-sum-exp `[B, H, S]` or None.
    """
    batch, num_heads, seq_len, _ = q.shape
    out = v.new_zeros(batch, num_heads, seq_len + 1, v.shape[3])  # the last row takes the padding
    lse = None
    if with_lse:
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.zeros(batch, num_heads, seq_len + 1, dtype=work, device=q.device)
    special = special_token_positions(grid, q.device)
    step, kv_heads = _chunk_sizes(q, k, tables, grid, with_lse)
    total = math.prod([table.counts[0] for table in tables])
    chunks = [torch.arange(i, min(i + step, total), device=q.device) for i in range(0, total, step)]
    for tiles in chunks:
        chunk = build_chunk(grid, tables, tiles, special)
        for heads, kv in _head_slices(q, k, kv_heads):
            rows = _attend_rows(
                q[:, heads], k[:, kv], v[:, kv], chunk, attn_mask, heads, scale, with_lse
            )
            _put(out, lse, rows, chunk.rows.flatten(), heads)
    if grid.num_special_tokens:
        _put_special(out, lse, q, k, v, special, attn_mask, scale)
    return out[:, :, :seq_len], None if lse is None else lse[:, :, :seq_len]


def _put(
    out: Tensor,
    lse: Tensor | None,
    rows: tuple[Tensor, Tensor | None],
    index: Tensor,
    heads: slice,
) -> None:
    """Write rows `[B, h, n, D]` to positions `index` (`[n]`) of some heads."""
    out[:, heads].index_copy_(2, index, rows[0])
    if lse is not None and rows[1] is not None:
        lse[:, heads].index_copy_(2, index, rows[1])


def _put_special(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    special: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
) -> None:
    """Rows of the special tokens, which see all, a few at a time where scores are kept."""
    seq_len = q.shape[2]
    batch = 1 if torch.compiler.is_compiling() else q.shape[0]
    step = max(1, CHUNK_BYTES // (8 * batch * q.shape[1] * seq_len))
    if lse is None and attn_mask is None:
        step = special.shape[0]
    everything = slice(0, q.shape[1])
    for index in special.split(step):
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, index])
        rows = attend(q.index_select(2, index), k, v, masks, scale, lse is not None)
        _put(out, lse, rows, index, everything)
