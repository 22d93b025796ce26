"""Native route on a CPU: tokens are addressed in place, nothing is gathered or permuted."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.kernels._native import load_library
from retrofit.runtime.errors import RetrofitError

from .axes import AxisTables, WindowAxis
from .pattern import Pattern
from .positions import axis_steps, first_grid_position, special_token_positions

SOURCE = Path(__file__).parent / "native.c"
ROW_STEP = 16  # rows that the kernel computes together are a multiple of these
MAX_ITEM_ROWS = 512
# Below this much work per thread, starting it costs more than it saves.
FLOPS_PER_THREAD = 5e6
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_TOKENS = 2**31 - 1

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class WindowCall(ctypes.Structure):
    """Arguments of the C function; mirrors `WindowCall` in native.c."""

    _fields_ = (
        ("query", _pointer),
        ("key", _pointer),
        ("value", _pointer),
        ("out", _pointer),
        ("lse", _pointer),
        ("seen", _pointer),
        ("bias", _pointer),
        ("q_stride", _long * 3),
        ("k_stride", _long * 3),
        ("v_stride", _long * 3),
        ("o_stride", _long * 3),
        ("mask_stride", _long * 3),
        ("queries", _pointer * 3),
        ("keys", _pointer * 3),
        ("low", _pointer * 3),
        ("high", _pointer * 3),
        ("num_queries", _pointer * 3),
        ("num_keys", _pointer * 3),
        ("axis", _pointer * 3),
        ("special", _pointer),
        ("masked", _int * 3),
        ("num_tiles", _int * 3),
        ("tile", _int * 3),
        ("span", _int * 3),
        ("length", _int * 3),
        ("num_special", _int),
        ("seq_len", _int),
        ("batch", _int),
        ("heads", _int),
        ("kv_heads", _int),
        ("dim", _int),
        ("dim_v", _int),
        ("rows_per_item", _int),
        ("dtype", _int),
        ("threads", _int),
        ("scale", ctypes.c_float),
        ("pairs", _pointer),
    )


class AxisArrays(NamedTuple):
    """Tables of one axis as the kernel reads them: int32, positions in the sequence."""

    queries: Tensor
    keys: Tensor
    low: Tensor
    high: Tensor
    num_queries: Tensor
    num_keys: Tensor
    axis: Tensor
    is_masked: bool


class NativePlan(NamedTuple):
    """What depends on the pattern only; axes slowest first."""

    axes: tuple[AxisArrays, AxisArrays, AxisArrays]
    special: Tensor
    num_pairs: int


def native_supports(device: str, dtype: torch.dtype, num_tokens: int) -> tuple[bool, str]:
    """Whether the native kernel can run a call, and the reason if not."""
    if device != "cpu":
        return False, f"tensors on {device}; the native kernel runs on the CPU"
    if dtype not in DTYPES:
        return False, f"{dtype}; the native kernel takes float32, bfloat16 and float16"
    if num_tokens > MAX_TOKENS:
        return False, f"{num_tokens} tokens; the native kernel takes 2^31 - 1"
    loaded, reason = library()
    return loaded is not None, reason


def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernel, or None and the reason."""
    return load_library(SOURCE)


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None,
    shift: Tensor | None,
    scale: float,
    with_lse: bool,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, S, D_v]` and log-sum-exp `[B, H, S]` or None.

    `pairs` (int64 `[]`) receives the number of query-key pairs that were computed.

    Raises:
        RetrofitError: If memory runs out.
    """
    loaded, reason = library()
    assert loaded is not None, reason
    assert loaded.retrofit_window_call_size() == ctypes.sizeof(WindowCall)
    if shift is not None:
        offsets = shift.tolist()
        axes = [
            axis._replace(shift=n) if isinstance(axis, WindowAxis) else axis
            for axis, n in zip(pattern.axes, offsets, strict=True)
        ]
        pattern = Pattern(pattern.grid, (axes[0], axes[1], axes[2]))
    batch, heads, seq_len, dim = q.shape
    out = v.new_empty(batch, seq_len, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, seq_len, dtype=torch.float32) if with_lse else None
    tensors = [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q, k, v)]
    plan = plan_native(pattern)
    flops = 2.0 * batch * heads * (dim + v.shape[3]) * plan.num_pairs
    threads = max(1, min(torch.get_num_threads(), int(flops / FLOPS_PER_THREAD)))
    call = WindowCall(
        seq_len=seq_len,
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        dim=dim,
        dim_v=v.shape[3],
        rows_per_item=rows_per_item(plan, heads // k.shape[1], batch * k.shape[1], threads),
        dtype=DTYPES[q.dtype],
        threads=threads,
        scale=scale,
        pairs=None if pairs is None else pairs.data_ptr(),
    )
    keep = _fill_call(call, tensors, out, lse, attn_mask, plan)
    status = loaded.retrofit_grid_window(ctypes.byref(call))
    del keep  # the arrays that the call points into
    if status:
        raise RetrofitError(
            "grid window: expected memory for the buffers of one thread, got none. Free memory, or "
            "lower the number of threads."
        )
    return out, lse


@lru_cache(maxsize=128)
def plan_native(pattern: Pattern) -> NativePlan:
    """Tables of a pattern in the form that the kernel reads."""
    tables = pattern.tables("cpu", None, pattern.native_tile())
    steps = axis_steps(pattern.grid)
    shape = pattern.grid.shape
    arrays = [
        _axis_arrays(
            tables[i], steps[i], first_grid_position(pattern.grid) if n == 0 else 0, shape[i]
        )
        for n, i in enumerate(pattern.order)
    ]
    special = special_token_positions(pattern.grid, "cpu").to(torch.int32)
    return NativePlan((arrays[0], arrays[1], arrays[2]), special, pattern.count_pairs())


def _axis_arrays(table: AxisTables, step: int, first: int, length: int) -> AxisArrays:
    """Positions and used slots of one axis; padding comes last in a tile and is cut off."""
    seen = torch.where(table.is_query, table.high, 0)
    num_keys = seen.amax(1)
    full = (table.low <= 0) & (table.high >= num_keys[:, None])

    def narrow(x: Tensor) -> Tensor:
        return x.to(torch.int32).contiguous()

    return AxisArrays(
        narrow(table.queries * step + first),
        narrow(table.keys * step + first),
        narrow(table.low),
        narrow(table.high),
        narrow(table.is_query.sum(1)),
        narrow(num_keys),
        narrow(torch.arange(length) * step + first),
        bool((~full & table.is_query).any()),
    )


def rows_per_item(plan: NativePlan, groups: int, heads: int, threads: int) -> int:
    """Rows of a work item: many share what is found of their keys; every thread has work."""
    tile = math.prod(axis.queries.shape[1] for axis in plan.axes)
    tiles = heads * math.prod(axis.queries.shape[0] for axis in plan.axes)
    rows = max(ROW_STEP, min(tile, MAX_ITEM_ROWS // groups // ROW_STEP * ROW_STEP))
    while threads > 1 and rows > 4 * ROW_STEP and tiles * -(-tile // rows) < 4 * threads:
        rows = -(-rows // 2 // ROW_STEP) * ROW_STEP
    return -(-tile // -(-tile // rows))  # even items


def _fill_call(
    call: WindowCall,
    tensors: Sequence[Tensor],
    out: Tensor,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    plan: NativePlan,
) -> list[Tensor]:
    """Point the call at tensors and tables; returns what must live as long as it."""
    q, k, v = tensors
    call.query, call.key, call.value, call.out = [x.data_ptr() for x in (q, k, v, out)]
    for strides, x in zip(
        (call.q_stride, call.k_stride, call.v_stride, call.o_stride), (q, k, v, out), strict=True
    ):
        strides[:] = x.stride()[:3]
    call.lse = None if lse is None else lse.data_ptr()
    keep = [*tensors]
    if attn_mask is not None:
        row = attn_mask[:, :, 0]
        if row.dtype == torch.bool:
            call.seen = row.data_ptr()
        else:
            row = row.to(torch.float32)
            call.bias = row.data_ptr()
        keep.append(row)
        sizes = zip(row.shape, row.stride(), strict=True)
        call.mask_stride[:] = [0 if size == 1 else stride for size, stride in sizes]
    for i, axis in enumerate(plan.axes):
        call.queries[i], call.keys[i] = axis.queries.data_ptr(), axis.keys.data_ptr()
        call.low[i], call.high[i] = axis.low.data_ptr(), axis.high.data_ptr()
        call.num_queries[i] = axis.num_queries.data_ptr()
        call.num_keys[i], call.axis[i] = axis.num_keys.data_ptr(), axis.axis.data_ptr()
        call.masked[i] = axis.is_masked
        call.num_tiles[i], call.tile[i] = axis.queries.shape
        call.span[i], call.length[i] = axis.keys.shape[1], axis.axis.shape[0]
    call.special, call.num_special = plan.special.data_ptr(), plan.special.shape[0]
    return keep
