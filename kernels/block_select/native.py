"""Pools, their scores and the selection by the native kernel."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels._native import load_library
from retrofit.kernels.block_sparse.native import DTYPES
from retrofit.runtime.errors import RetrofitError

SOURCE = Path(__file__).parent / "native.c"
RULES = {"drop": 0, "keep": 1, "keep-strict": 2}
# Below this many elements per thread, starting it costs more than it saves.
ELEMENTS_PER_THREAD = 2**18

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class PoolCall(ctypes.Structure):
    """Mirrors `PoolCall` in native.c."""

    _fields_ = (
        ("tokens", _pointer),
        ("pools", _pointer),
        ("batch", _long),
        ("heads", _long),
        ("length", _long),
        ("dim", _long),
        ("block", _long),
        ("stride", _long * 4),
        ("dtype", _int),
        ("is_max", _int),
        ("threads", _int),
    )


class ScoreCall(ctypes.Structure):
    """Mirrors `ScoreCall` in native.c."""

    _fields_ = (
        ("queries", _pointer),
        ("keys", _pointer),
        ("scores", _pointer),
        ("groups", _long),
        ("rows", _long),
        ("columns", _long),
        ("dim", _long),
        ("threads", _int),
        ("scale", ctypes.c_float),
    )


class SelectCall(ctypes.Structure):
    """Mirrors `SelectCall` in native.c."""

    _fields_ = (
        ("scores", _pointer),
        ("kept", _pointer),
        ("fewest", _pointer),
        ("mass", _pointer),
        ("heads", _long),
        ("rows", _long),
        ("columns", _long),
        ("rule", _int),
        ("threads", _int),
    )


def native_supports(device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the native kernel can run a call, and the reason if not."""
    if device != "cpu":
        return False, f"tensors on {device}; the native kernel runs on the CPU"
    if dtype not in DTYPES:
        return False, f"{dtype}; the native kernel takes float32, bfloat16 and float16"
    library, reason = load_library(SOURCE)
    return library is not None, reason


def pool_natively(x: Tensor, block: int, pooling: str) -> Tensor:
    """Pools of the tokens of each block, float32 `[B, H, ceil(S / block), D]`."""
    batch, heads, length, dim = x.shape
    pools = torch.empty(batch, heads, -(-length // block), dim)
    call = PoolCall(
        tokens=x.data_ptr(),
        pools=pools.data_ptr(),
        batch=batch,
        heads=heads,
        length=length,
        dim=dim,
        block=block,
        stride=(_long * 4)(*x.stride()),
        dtype=DTYPES[x.dtype],
        is_max=pooling == "max",
        threads=_threads(x.numel()),
    )
    _run("retrofit_pool", call)
    return pools


def score_natively(pooled_q: Tensor, pooled_k: Tensor, scale: float) -> Tensor:
    """Softmax over keys of the products of pools, float32.

    Args:
        pooled_q: float32 `[B, H, n_q, D]`.
        pooled_k: float32 `[B, H_kv, n_k, D]`.
        scale: Factor on the products.

    Returns:
        float32 `[B, H, n_q, n_k]`.
    """
    (batch, heads, num_q, dim), (_, kv_heads, num_k, _) = pooled_q.shape, pooled_k.shape
    pooled_q, pooled_k = pooled_q.contiguous(), pooled_k.contiguous()
    scores = torch.empty(batch, heads, num_q, num_k)
    call = ScoreCall(
        queries=pooled_q.data_ptr(),
        keys=pooled_k.data_ptr(),
        scores=scores.data_ptr(),
        groups=batch * kv_heads,
        rows=heads // kv_heads * num_q,
        columns=num_k,
        dim=dim,
        threads=_threads(scores.numel() * dim // 8),
        scale=scale,
    )
    _run("retrofit_score", call)
    return scores


def select_natively(scores: Tensor, fewest: Tensor, limit: Tensor | None, crossing: str) -> Tensor:
    """Best entries of each row.

    Args:
        scores: float32 `[B, H, n_q, n_k]`.
        fewest: Entries that are kept whatever the mass, int64 `[B, H]`.
        limit: What the cumulated mass is compared with, float32 `[B, H]`, or None.
        crossing: What happens to the entry that crosses it.

    Returns:
        bool, the shape of `scores`.
    """
    scores, fewest = scores.contiguous(), fewest.contiguous()
    limit = None if limit is None else limit.contiguous()
    kept = torch.empty(scores.shape, dtype=torch.bool)
    call = SelectCall(
        scores=scores.data_ptr(),
        kept=kept.data_ptr(),
        fewest=fewest.data_ptr(),
        mass=None if limit is None else limit.data_ptr(),
        heads=scores.shape[0] * scores.shape[1],
        rows=scores.shape[2],
        columns=scores.shape[3],
        rule=RULES[crossing],
        threads=_threads(scores.numel() * 8),
    )
    _run("retrofit_select", call)
    return kept


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD))


def _run(name: str, call: Any) -> None:
    library, reason = load_library(SOURCE)
    assert library is not None, reason
    which = (PoolCall, ScoreCall, SelectCall).index(type(call))
    assert library.retrofit_select_sizes(which) == ctypes.sizeof(call)
    if getattr(library, name)(ctypes.byref(call)):
        raise RetrofitError(
            "select_blocks: expected memory for a copy of the pooled keys, got none. Free memory."
        )
