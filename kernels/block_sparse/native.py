"""Call the native kernel: what it supports, and how its arguments are laid out."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from retrofit.kernels._native import load_library
from retrofit.kernels.block_sparse.lists import BlockLists
from retrofit.kernels.block_sparse.plain import Problem
from retrofit.runtime.errors import ConfigError, RetrofitError

SOURCE = Path(__file__).parent / "native.c"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_TOKENS = 2**31 - 1
# Below this much work per thread, starting it costs more than it saves.
FLOPS_PER_THREAD = 5e6

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Call(ctypes.Structure):
    """Arguments of the C function; mirrors `Call` in native.c."""

    _fields_ = (
        ("query", _pointer),
        ("key", _pointer),
        ("value", _pointer),
        ("out", _pointer),
        ("lse", _pointer),
        ("batch", _long),
        ("heads", _long),
        ("kv_heads", _long),
        ("len_q", _long),
        ("len_k", _long),
        ("dim", _long),
        ("dim_v", _long),
        ("q_stride", _long * 3),
        ("k_stride", _long * 3),
        ("v_stride", _long * 3),
        ("o_stride", _long * 3),
        ("block_q", _long),
        ("block_k", _long),
        ("block_mask", _pointer),
        ("indices", _pointer),
        ("counts", _pointer),
        ("mask_ids", _pointer),
        ("mask_bits", _pointer),
        ("list_stride", _long * 3),
        ("list_width", _long),
        ("num_masks", _long),
        ("mask_words", _long),
        ("attn_mask", _pointer),
        ("m_stride", _long * 4),
        ("dtype", _int),
        ("attn_mask_kind", _int),
        ("is_causal", _int),
        ("threads", _int),
        ("scale", ctypes.c_float),
    )


def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernel, or None and the reason."""
    return load_library(SOURCE)


def describe_instructions() -> str:
    """Which instructions the kernel was compiled for, for reports."""
    loaded, reason = library()
    if loaded is None:
        return reason
    info = loaded.retrofit_native_info()
    dot = " with bfloat16 dot products" if info % 2 else ""
    return f"{info // 2 * 8}-bit vectors{dot}"


def native_supports(device: str, dtype: torch.dtype, max_tokens: int = 0) -> tuple[bool, str]:
    """Whether the native kernel can run a call, and the reason if not."""
    if device != "cpu":
        return False, f"tensors on {device}; the native kernel runs on the CPU"
    if dtype not in DTYPES:
        return False, f"{dtype}; the native kernel takes float32, bfloat16 and float16"
    if max_tokens > MAX_TOKENS:
        return False, f"{max_tokens} tokens; the native kernel takes 2^31 - 1"
    loaded, reason = library()
    return loaded is not None, reason


def attend_native(
    problem: Problem, block_mask: Tensor | BlockLists, *, out: Tensor, lse: Tensor | None
) -> None:
    """Fill `out` `[B, H, S_q, D_v]` and, where given, `lse` `[B, H, S_q]` (float32, contiguous).

    Raises:
        ConfigError: If a list names a block or mask that does not exist.
        RetrofitError: If memory runs out.
    """
    loaded, reason = library()
    assert loaded is not None, reason
    assert loaded.retrofit_native_call_size() == ctypes.sizeof(Call)
    block_size = problem.block_size
    query, key, value = [
        x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
        for x in (problem.query, problem.key, problem.value)
    ]
    (batch, heads, len_q, dim), (_, kv_heads, len_k, dim_v) = query.shape, value.shape
    lists = block_mask if isinstance(block_mask, BlockLists) else None
    visited = len_k if lists is None else min(len_k, lists.max_count * block_size[1])
    flops = 2.0 * batch * heads * len_q * visited * (dim + dim_v)
    call = Call(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        out=out.data_ptr(),
        lse=None if lse is None else lse.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        len_q=len_q,
        len_k=len_k,
        dim=dim,
        dim_v=dim_v,
        q_stride=(_long * 3)(*query.stride()[:3]),
        k_stride=(_long * 3)(*key.stride()[:3]),
        v_stride=(_long * 3)(*value.stride()[:3]),
        o_stride=(_long * 3)(*out.stride()[:3]),
        block_q=block_size[0],
        block_k=block_size[1],
        dtype=DTYPES[query.dtype],
        is_causal=problem.is_causal,
        threads=max(1, min(torch.get_num_threads(), int(flops / FLOPS_PER_THREAD))),
        scale=problem.scale,
    )
    # what the pointers point to must live until the call returns
    alive = _point_at_blocks(call, block_mask), _point_at_mask(call, problem.attn_mask)
    status = loaded.retrofit_block_sparse(ctypes.byref(call))
    del alive
    if status == 2:
        raise ConfigError(
            "block_sparse_attention: expected lists that name existing blocks and masks, got one "
            "beyond them. Build them with lists_from_mask."
        )
    if status:
        raise RetrofitError(
            "block_sparse_attention: expected memory for the buffers of one thread, got none. "
            "Free memory, or lower the number of threads."
        )


def _broadcast_strides(x: Tensor) -> list[int]:
    """Strides in which an axis of size 1 stands for any size."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def _point_at_blocks(call: Call, block_mask: Tensor | BlockLists) -> list[Tensor]:
    if not isinstance(block_mask, BlockLists):
        kept = block_mask.contiguous()
        call.block_mask = kept.data_ptr()
        call.list_stride[:] = [*_broadcast_strides(kept)[:2], kept.shape[3]]
        return [kept]
    indices, counts = block_mask.indices.contiguous(), block_mask.counts.contiguous()
    call.indices, call.counts = indices.data_ptr(), counts.data_ptr()
    call.list_width = indices.shape[3]
    call.list_stride[:] = [*_broadcast_strides(indices)[:2], indices.shape[3]]
    alive = [indices, counts]
    if block_mask.mask_ids is not None and block_mask.mask_bits is not None:
        ids, bits = block_mask.mask_ids.contiguous(), block_mask.mask_bits.contiguous()
        call.mask_ids, call.mask_bits = ids.data_ptr(), bits.data_ptr()
        call.num_masks, call.mask_words = bits.shape[0], bits.shape[2]
        alive += [ids, bits]
    return alive


def _point_at_mask(call: Call, attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None:
        return None
    is_bool = attn_mask.dtype == torch.bool
    mask = attn_mask if is_bool else attn_mask.to(torch.float32)
    call.attn_mask, call.attn_mask_kind = mask.data_ptr(), 1 if is_bool else 2
    call.m_stride[:] = _broadcast_strides(mask)
    return mask
