"""Route through Triton on a GPU: settings, tables and launch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrofit.kernels._triton import capability, pad_dim, with_adjacent_channels
from retrofit.kernels._triton_launch import Launch

from .axes import AxisTables
from .key_tiles import key_tables
from .pattern import Pattern
from .positions import axis_steps, first_grid_position, special_token_positions

LOG2E = 1 / math.log(2)


class AxisArrays(NamedTuple):
    """Tables of one axis as the kernels read them: int32, positions in the sequence."""

    rows: Tensor  # [3, num_tiles, tile]: position, low, high
    columns: Tensor  # [num_tiles, span]
    counts: Tensor  # [2, num_tiles]: used row slots, used column slots
    is_masked: bool


class TritonPlan(NamedTuple):
    """What depends on the pattern only; axes slowest first."""

    axes: tuple[AxisArrays, AxisArrays, AxisArrays]
    whole: tuple[AxisArrays, AxisArrays, AxisArrays]  # one tile with all tokens, for special rows
    special: Tensor

    def which(self, special_rows: bool) -> tuple[AxisArrays, AxisArrays, AxisArrays]:
        """The axes that a launch walks."""
        return self.whole if special_rows else self.axes

    def num_tiles(self, special_rows: bool) -> int:
        """Tiles of a launch."""
        return math.prod([axis.columns.shape[0] for axis in self.which(special_rows)])

    def rows_per_tile(self, special_rows: bool) -> int:
        """Rows of a tile, padding included."""
        if special_rows:
            return self.special.shape[0]
        return math.prod([axis.rows.shape[2] for axis in self.axes])

    def arguments(self, special_rows: bool) -> list[Any]:
        """Arguments of a kernel, from the tables of the rows to the widths of the columns."""
        axes = self.which(special_rows)
        return [
            *[axis.rows for axis in axes],
            *[axis.columns for axis in axes],
            *[axis.counts for axis in axes],
            self.special,
            self.special.shape[0],
            *[axis.columns.shape[0] for axis in axes],
            *[axis.rows.shape[2] for axis in axes],
            *[axis.columns.shape[1] for axis in axes],
        ]


def choose_launch(head_dim: int, element_size: int, rows: int, capability: int) -> Launch:
    """Settings that compile without spills; not tuned on a device yet.

    Args:
        head_dim: Of keys or values, the larger.
        element_size: Bytes of an element.
        rows: Query rows of a tile.
        capability: Of the device, times ten: 90 for an H100.
    """
    if element_size == 4:
        return Launch(32, 32, 4, 1) if head_dim <= 64 else Launch(32, 16, 8, 1)
    if head_dim > 128:
        return Launch(64, 32 if capability >= 90 else 16, 8, 2)
    if rows <= 64 and head_dim <= 64:
        return Launch(64, 64, 4, 3)
    return Launch(128, 64 if capability >= 90 or head_dim <= 64 else 32, 8, 3)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, S, D_v]` and log-sum-exp `[B, H, S]` or None."""
    batch, heads, seq_len, _ = q.shape
    out = v.new_empty(batch, seq_len, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, seq_len, dtype=torch.float32) if with_lse else None
    q, k, v = [with_adjacent_channels(x) for x in (q, k, v)]
    plan = find_plan(pattern, q.device, shift)
    _launch(q, k, v, out, lse, plan, attn_mask, scale, False)
    if plan.special.shape[0]:
        _launch(q, k, v, out, lse, plan, attn_mask, scale, True)
    return out, lse


def find_plan(
    pattern: Pattern, device: torch.device, shift: Tensor | None, *, of_keys: bool = False
) -> TritonPlan:
    """The plan of a pattern; kept, unless the shift is a tensor whose values are not known.

    Args:
        pattern: What is seen.
        device: Where the tables live.
        shift: int64 `[3]`, in place of the shifts of the settings.
        of_keys: Whether rows are keys, and columns the queries that see them.
    """
    if shift is None:
        return _plan_cached(pattern, device, of_keys)
    return plan_triton(pattern, device, shift, of_keys)


@lru_cache(maxsize=128)
def _plan_cached(pattern: Pattern, device: torch.device, of_keys: bool) -> TritonPlan:
    return plan_triton(pattern, device, None, of_keys)


def plan_triton(
    pattern: Pattern, device: torch.device, shift: Tensor | None, of_keys: bool = False
) -> TritonPlan:
    """Tables of a pattern in the form that the kernels read, without waiting for the device."""
    make = key_tables if of_keys else Pattern.tables
    tables = make(pattern, device, shift, pattern.block_tile())
    steps, shape, grid = axis_steps(pattern.grid), pattern.grid.shape, pattern.grid
    axes, whole = [], []
    for n, i in enumerate(pattern.order):
        first = first_grid_position(grid) if n == 0 else 0
        axes.append(_axis_arrays(tables[i], steps[i], first))
        everything = torch.arange(shape[i], device=device)[None] * steps[i] + first
        whole.append(
            AxisArrays(
                everything.expand(3, 1, -1).to(torch.int32).contiguous(),
                everything.to(torch.int32),
                torch.full((2, 1), shape[i], dtype=torch.int32, device=device),
                False,
            )
        )
    special = special_token_positions(grid, device).to(torch.int32)
    return TritonPlan((axes[0], axes[1], axes[2]), (whole[0], whole[1], whole[2]), special)


def _axis_arrays(table: AxisTables, step: int, first: int) -> AxisArrays:
    """Positions and used slots of one axis; padding comes last in a tile and is cut off."""
    rows = torch.stack([table.queries * step + first, table.low, table.high])
    num_keys = torch.where(table.is_query, table.high, 0).amax(1)
    counts = torch.stack([table.is_query.sum(1), num_keys])
    return AxisArrays(
        rows.to(torch.int32),
        (table.keys * step + first).to(torch.int32).contiguous(),
        counts.to(torch.int32),
        table.hides_keys,
    )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    plan: TritonPlan,
    attn_mask: Tensor | None,
    scale: float,
    special_rows: bool,
) -> None:
    from .triton_kernel import grid_window_fwd_kernel

    batch, heads, seq_len, dim = q.shape
    widest = max(dim, v.shape[3])
    num_rows = plan.rows_per_tile(special_rows)
    launch = choose_launch(widest, q.element_size(), num_rows, capability(q.device))
    row_blocks = -(-num_rows // launch.block_m)
    masks, strides = key_mask(attn_mask)
    grid = (plan.num_tiles(special_rows) * row_blocks * batch * heads,)
    grid_window_fwd_kernel[grid](
        q,
        k,
        v,
        out,
        lse,
        *masks,
        *plan.arguments(special_rows),
        row_blocks,
        heads,
        heads // k.shape[1],
        seq_len,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *strides,
        scale * LOG2E,
        **launch.options(),
        **kernel_constants(plan, special_rows, (dim, v.shape[3]), launch),
        HAS_SEEN=masks[0] is not None,
        HAS_BIAS=masks[1] is not None,
        HAS_LSE=lse is not None,
    )


def kernel_constants(
    plan: TritonPlan, special_rows: bool, dims: tuple[int, int], launch: Launch
) -> dict[str, Any]:
    """Compile-time arguments that depend on shapes and pattern."""
    return {
        "HEAD_DIM": dims[0],
        "VALUE_DIM": dims[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": pad_dim(dims[0]),
        "BLOCK_V": pad_dim(dims[1]),
        **{f"MASKED_{n}": axis.is_masked for n, axis in enumerate(plan.which(special_rows))},
        "SPECIAL_ROWS": special_rows,
        "HAS_SPECIAL": plan.special.shape[0] > 0,
    }


def key_mask(attn_mask: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Key mask as `(seen, bias)`, one of them at most, and its strides."""
    if attn_mask is None:
        return [None, None], [0, 0, 0]
    row = attn_mask[:, :, 0]
    is_bool = row.dtype == torch.bool
    row = row.view(torch.uint8) if is_bool else row.to(torch.float32)
    sizes = zip(row.shape, row.stride(), strict=True)
    strides = [0 if size == 1 else stride for size, stride in sizes]
    return [row, None] if is_bool else [None, row], strides
