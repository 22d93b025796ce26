"""Gradients of the tiled route, from the log-sum-exp of the forward pass, a chunk at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.layout.grid import TokenGrid

from .axes import AxisTables
from .tiled import (
    choose_chunk,
    chunk_masks,
    gather_rows,
    grouped_scores,
    head_slices,
    iterate_chunks,
    special_rows,
    work_dtype,
)


class Rows(NamedTuple):
    """What the gradients of some rows need, `[X, H, Q, ...]` each."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor


def row_gradients(
    rows: Rows, k: Tensor, v: Tensor, masks: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries `[X, H, Q, D]`, keys and values `[X, H_kv, K, D]`."""
    work = work_dtype(rows.q)
    kv_heads = k.shape[1]
    lse = rows.lse.masked_fill(rows.lse == -math.inf, math.inf)[..., None]
    weights = (grouped_scores(rows.q, k, masks, scale) - lse).exp().unflatten(1, (kv_heads, -1))
    dout = rows.dout.to(work).unflatten(1, (kv_heads, -1))
    dv = (weights.transpose(-2, -1) @ dout).sum(2)
    dweights = dout @ v.to(work)[:, :, None].transpose(-2, -1)
    delta = rows.delta.unflatten(1, (kv_heads, -1))[..., None]
    dscores = weights * (dweights - delta) * scale
    dq = (dscores @ k.to(work)[:, :, None]).flatten(1, 2)
    dk = (dscores.transpose(-2, -1) @ rows.q.to(work).unflatten(1, (kv_heads, -1))).sum(2)
    return dq, dk, dv


def tiled_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: TokenGrid,
    tables: list[AxisTables],
    *,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `tiled_attention`.

    Args:
        dout: Gradient of the output, `[B, H, S, D_v]`.
        dlse: Gradient of the log-sum-exp, `[B, H, S]`, or None.
        q: `[B, H, S, D]`.
        k: `[B, H_kv, S, D]`.
        v: `[B, H_kv, S, D_v]`.
        out: The output.
        lse: The log-sum-exp.
        grid: Layout of the sequence.
        tables: What is seen on each axis.
        attn_mask: Rank 4, or None.
        scale: Factor of the scores.

    Returns:
        Gradients of `q`, `k` and `v`.
    """
    work = work_dtype(q)
    batch = q.shape[0]
    delta = (dout.to(work) * out.to(work)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dq = torch.zeros(q.shape, dtype=work, device=q.device)
    dk = torch.zeros(k.shape, dtype=work, device=q.device)
    dv = torch.zeros(v.shape, dtype=work, device=q.device)
    size = choose_chunk(q, k, grid, tables, 24)
    for chunk in iterate_chunks(grid, tables, size, q.device):
        for heads, kv in head_slices(q, k, size.kv_heads):
            row_lse = gather_rows(lse[:, heads, :, None], chunk.queries)[..., 0]
            padding = (~chunk.is_query)[None, :, None].expand(batch, -1, -1, -1).flatten(0, 1)
            rows = Rows(
                gather_rows(q[:, heads], chunk.queries),
                gather_rows(dout[:, heads], chunk.queries),
                row_lse.masked_fill(padding, math.inf),  # its weights become 0
                gather_rows(delta[:, heads, :, None], chunk.queries)[..., 0],
            )
            masks = chunk_masks(chunk, attn_mask, heads, batch)
            keys, values = gather_rows(k[:, kv], chunk.keys), gather_rows(v[:, kv], chunk.keys)
            dq_rows, dk_rows, dv_rows = row_gradients(rows, keys, values, masks, scale)
            _add_rows(dq[:, heads], chunk.queries, dq_rows)
            _add_rows(dk[:, kv], chunk.keys, dk_rows)
            _add_rows(dv[:, kv], chunk.keys, dv_rows)
    if grid.num_special_tokens:
        for index, masks in special_rows(q, grid, attn_mask, 24):
            rows = Rows(*[x.index_select(2, index) for x in (q, dout, lse, delta)])
            dq_rows, dk_rows, dv_rows = row_gradients(rows, k, v, masks, scale)
            dq.index_copy_(2, index, dq_rows)
            dk += dk_rows
            dv += dv_rows
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows `[B * c, h, n, D]` to positions `[c, n]` of `[B, h, S, D]`."""
    rows = rows.unflatten(0, (total.shape[0], index.shape[0])).transpose(1, 2).flatten(2, 3)
    total.index_add_(2, index.flatten(), rows)
