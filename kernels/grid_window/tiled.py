"""Plain PyTorch route: tiles of queries with their gathered keys, a chunk of tiles at a time.

Traceable (`fullgraph`, export) and differentiable; the only memory beside inputs and output is one
chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from retrofit.layout.grid import TokenGrid

from .axes import AxisTables
from .positions import Chunk, build_chunk, special_token_positions, tile_size

CHUNK_BYTES = 8 << 20


class ChunkSize(NamedTuple):
    """Tiles, key heads and query slots of a tile that are worked on together."""

    tiles: int
    kv_heads: int
    slots: int


def work_dtype(q: Tensor) -> torch.dtype:
    """Dtype of scores and sums."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def attend(
    q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of `[X, H, Q, D]` to `[X, H_kv, K, D]` under masks of `[X, 1 or H, Q or 1, K]`."""
    if not with_lse:
        mask = join_masks(masks, q.dtype)
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
        return out, None
    scores = grouped_scores(q, k, masks, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    out = weights.unflatten(1, (k.shape[1], -1)) @ v.to(weights.dtype)[:, :, None]
    return out.flatten(1, 2).to(q.dtype), lse


def grouped_scores(q: Tensor, k: Tensor, masks: list[Tensor], scale: float) -> Tensor:
    """Scaled and masked scores `[X, H, Q, K]` in the working dtype."""
    work = work_dtype(q)
    grouped = (q.to(work) * scale).unflatten(1, (k.shape[1], -1))  # [X, H_kv, G, Q, D]
    scores = (grouped @ k.to(work)[:, :, None].transpose(-2, -1)).flatten(1, 2)
    for mask in masks:
        scores = scores + as_bias(mask, work)
    return scores


def join_masks(masks: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """One mask, bool if all are, else to be added in `dtype`."""
    joined: Tensor | None = None
    for mask in masks:
        if joined is None:
            joined = mask if mask.dtype == torch.bool else mask.to(dtype)
        elif joined.dtype == mask.dtype == torch.bool:
            joined = joined & mask
        else:
            joined = as_bias(joined, dtype) + as_bias(mask, dtype)
    return joined


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in the form that is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[c, n]` of `[B, H, S, D]`, to `[B * c, H, n, D]`."""
    rows = x.transpose(1, 2).index_select(1, index.flatten())
    return rows.reshape(x.shape[0] * index.shape[0], index.shape[1], *rows.shape[2:]).transpose(
        1, 2
    )


def chunk_masks(chunk: Chunk, attn_mask: Tensor | None, heads: slice, batch: int) -> list[Tensor]:
    """Masks of a chunk, `[B * c, 1 or h, R or 1, K]` each."""
    masks = []
    if chunk.visible is not None:
        masks.append(chunk.visible[None, :, None].expand(batch, -1, -1, -1, -1).flatten(0, 1))
    if attn_mask is not None:
        mask = attn_mask if attn_mask.shape[1] == 1 else attn_mask[:, heads]
        if mask.shape[2] == 1:
            picked = mask[:, :, 0, chunk.keys][:, :, :, None]
        else:
            picked = mask[:, :, chunk.queries[:, :, None], chunk.keys[:, None, :]]
        masks.append(picked.transpose(1, 2).expand(batch, -1, -1, -1, -1).flatten(0, 1))
    return masks


def choose_chunk(
    q: Tensor, k: Tensor, grid: TokenGrid, tables: list[AxisTables], bytes_per_pair: int
) -> ChunkSize:
    """Chunk whose memory stays near `CHUNK_BYTES`.

    Traced code counts one batch entry, so that the batch size can stay symbolic.

    Args:
        q: Queries.
        k: Keys.
        grid: Layout of the sequence.
        tables: What is seen on each axis.
        bytes_per_pair: Memory that a score takes, per query head.
    """
    batch = 1 if torch.compiler.is_compiling() else q.shape[0]
    tiles, n_q, n_k = tile_size(tables)
    n_k += grid.num_special_tokens
    groups = q.shape[1] // k.shape[1]
    row = 2 * q.shape[3] * q.element_size()
    mask = 5 * n_k if any(table.is_masked for table in tables) else 0
    per_slot = batch * (groups * (row + bytes_per_pair * n_k) + mask)  # for one key head
    slots = max(64, CHUNK_BYTES // per_slot)
    if slots < n_q:
        return ChunkSize(1, 1, slots)
    per_head = batch * n_k * row + n_q * per_slot
    heads = min(k.shape[1], max(1, CHUNK_BYTES // per_head))
    return ChunkSize(min(tiles, max(1, CHUNK_BYTES // (heads * per_head))), heads, n_q)


def iterate_chunks(
    grid: TokenGrid, tables: list[AxisTables], size: ChunkSize, device: torch.device
) -> Iterator[Chunk]:
    """All rows of all tiles, a chunk at a time."""
    tiles, n_q, _ = tile_size(tables)
    special = special_token_positions(grid, device)
    for tile in range(0, tiles, size.tiles):
        numbers = torch.arange(tile, min(tile + size.tiles, tiles), device=device)
        for slot in range(0, n_q, size.slots):
            slots = torch.arange(slot, min(slot + size.slots, n_q), device=device)
            yield build_chunk(grid, tables, numbers, slots, special)


def head_slices(q: Tensor, k: Tensor, kv_heads: int) -> list[tuple[slice, slice]]:
    """Query heads and the key heads they read, `kv_heads` at a time."""
    groups = q.shape[1] // k.shape[1]
    ends = [(i, min(i + kv_heads, k.shape[1])) for i in range(0, k.shape[1], kv_heads)]
    return [(slice(i * groups, j * groups), slice(i, j)) for i, j in ends]


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    tables: list[AxisTables],
    *,
    attn_mask: Tensor | None,
    scale: float,
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
        scale: Factor of the scores.
        with_lse: Also return the log-sum-exp.

    Returns:
        Output `[B, H, S, D_v]` and log-sum-exp `[B, H, S]` or None.
    """
    batch, num_heads, seq_len, _ = q.shape
    # [B, S, H, D_v] in memory, as models want it
    out = v.new_empty(batch, seq_len, num_heads, v.shape[3]).transpose(1, 2)
    lse = None
    if with_lse:
        lse = torch.empty(batch, num_heads, seq_len, dtype=work_dtype(q), device=q.device)
    size = choose_chunk(q, k, grid, tables, 8 if with_lse else 0)
    slices = head_slices(q, k, size.kv_heads)
    for chunk in iterate_chunks(grid, tables, size, q.device):
        for heads, kv in slices:
            rows, row_lse = attend(
                gather_rows(q[:, heads], chunk.queries),
                gather_rows(k[:, kv], chunk.keys),
                gather_rows(v[:, kv], chunk.keys),
                chunk_masks(chunk, attn_mask, heads, batch),
                scale,
                with_lse,
            )
            put_rows(out[:, heads], chunk, rows)
            if lse is not None and row_lse is not None:
                put_rows(lse[:, heads], chunk, row_lse)
    if grid.num_special_tokens:
        _put_special(out, lse, q, k, v, grid, attn_mask, scale)
    # decomposing a graph loses the strides of what was written into, and with them later views
    return out.contiguous() if torch.compiler.is_exporting() else out, lse


def put_rows(out: Tensor, chunk: Chunk, rows: Tensor) -> None:
    """Write rows `[B * c, h, n, ...]` of a chunk to `[B, h, S, ...]`.

    Padding writes the same values once more, and passes no gradient.
    """
    count = chunk.queries.shape[0]
    rows = rows.unflatten(0, (out.shape[0], count)).transpose(1, 2)  # [B, h, c, n, ...]
    if rows.requires_grad:
        is_query = chunk.is_query.reshape(*chunk.is_query.shape, *(1,) * (rows.dim() - 4))
        rows = torch.where(is_query, rows, rows.detach())
    out.index_copy_(2, chunk.queries.flatten(), rows.flatten(2, 3))


def _put_special(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    attn_mask: Tensor | None,
    scale: float,
) -> None:
    """Rows of the special tokens, which see all."""
    for index, mask in special_rows(q, grid, attn_mask, 8 if lse is not None else 0):
        rows, row_lse = attend(q.index_select(2, index), k, v, mask, scale, lse is not None)
        # into a view, as the tiles are: once a view was written, a tracer refuses the tensor itself
        out[:, :].index_copy_(2, index, rows)
        if lse is not None and row_lse is not None:
            lse[:, :].index_copy_(2, index, row_lse)


def special_rows(
    q: Tensor, grid: TokenGrid, attn_mask: Tensor | None, bytes_per_pair: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Positions of special tokens, and their rows of the mask, a few at a time."""
    batch = 1 if torch.compiler.is_compiling() else q.shape[0]
    special = special_token_positions(grid, q.device)
    step = grid.num_special_tokens
    if bytes_per_pair or attn_mask is not None:
        step = max(1, CHUNK_BYTES // (8 * batch * q.shape[1] * q.shape[2]))
    for index in special.split(step):
        mask = attn_mask
        if mask is not None and mask.shape[2] != 1:
            mask = mask[:, :, index]
        yield index, [] if mask is None else [mask]
