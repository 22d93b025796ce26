"""The public function: check what was given, choose a backend, run it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from retrofit.kernels._dispatch import forced_backend
from retrofit.kernels.block_sparse.backends import OPERATOR
from retrofit.kernels.block_sparse.lists import (
    BlockLists,
    check_block_mask,
    check_block_size,
    count_blocks,
)
from retrofit.kernels.block_sparse.ops import block_sparse_op, pack_blocks
from retrofit.kernels.block_sparse.plain import Problem, attend_plain, new_results
from retrofit.kernels.block_sparse.reference import attend_reference
from retrofit.runtime.errors import ConfigError

WHERE = OPERATOR


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor | BlockLists,
    *,
    block_size: tuple[int, int] = ...,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor | BlockLists,
    *,
    block_size: tuple[int, int] = ...,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor | BlockLists,
    *,
    block_size: tuple[int, int] = (128, 64),
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend only to the key blocks that a mask keeps.

    A query sees a key where its block is kept, `attn_mask` allows it and, if causal, the key is not
    after the query. A query that sees no key gets zeros and log-sum-exp -inf.

    Args:
        query: `[B, H, S_q, D]`, any strides.
        key: `[B, H_kv, S_k, D]`; `H_kv` divides `H`, and head `h` reads key head
            `h // (H / H_kv)`.
        value: `[B, H_kv, S_k, D_v]`.
        block_mask: bool `[B or 1, H or 1, ceil(S_q / block_q), ceil(S_k / block_k)]`, True where
            a block is kept; or the equivalent `BlockLists`.
        block_size: Query tokens and key tokens per block; the last block may be short.
        attn_mask: bool (True is seen) or float (added to the scores), broadcastable to
            `[B, H, S_q, S_k]`. A key padding mask `[B, 1, 1, S_k]` is never expanded.
        is_causal: Hide keys after the query, counted from the first token of both
            (as `scaled_dot_product_attention` does).
        scale: Factor on the scores, `D ** -0.5` when None.
        return_lse: Also return the natural log-sum-exp of the scores.
        backend: `triton`, `native`, `torch` or `reference`; None takes `RETROFIT_BACKEND`, else
            the first that can run the call. Gradients take the PyTorch route on every device.
            `torch` leaves no operator of ours in a traced graph, so that an exported program
            loads without retrofit.

    Returns:
        Output `[B, H, S_q, D_v]`, in the dtype of `value` (of autocast where it is on); with
        `return_lse` also `[B, H, S_q]`, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: If shapes, dtypes or the backend's name do not fit.
        UnsupportedError: If the backend that was asked for can't run the call.
    """
    sizes = check_block_size(block_size, WHERE)
    _check_tensors(query, key, value)
    query, key, value = align_dtypes(query, key, value)
    lengths = query.shape[2], key.shape[2]
    blocks = count_blocks(lengths[0], sizes[0]), count_blocks(lengths[1], sizes[1])
    leading = query.shape[0], query.shape[1]
    check_block_mask(block_mask, leading, blocks, sizes, WHERE)
    problem = Problem(
        query=query,
        key=key,
        value=value,
        block_size=sizes,
        attn_mask=_as_full_rank(attn_mask, (*query.shape[:3], lengths[1])),
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    out, lse = _run(problem, block_mask, return_lse, backend)
    return (out, lse) if return_lse else out


def _run(
    p: Problem, block_mask: Tensor | BlockLists, return_lse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Run the operator, or PyTorch operations in the open where that is asked for or needed."""
    name = forced_backend(OPERATOR, backend) or ""
    is_learned = p.attn_mask is not None and p.attn_mask.requires_grad and torch.is_grad_enabled()
    if not p.query.shape[2] or not p.key.shape[2]:
        out, lse = new_results(p.query, p.value)
        return out.zero_(), lse.fill_(float("-inf"))
    if name == "reference":
        return attend_reference(p, block_mask)
    if is_learned or (name == "torch" and torch.compiler.is_compiling()):
        if is_under_autocast(p.query):
            with torch.autocast(p.query.device.type, enabled=False):
                return attend_plain(p, block_mask)
        return attend_plain(p, block_mask)
    tensors = p.query, p.key, p.value
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return block_sparse_op(
        *tensors,
        pack_blocks(block_mask),
        p.attn_mask,
        *p.block_size,
        p.is_causal,
        p.scale,
        return_lse or needs_grad,
        name,
    )


def align_dtypes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the three to one dtype: that of autocast where it is on, else that of `value`."""
    dtype = value.dtype
    if is_under_autocast(query) and torch.float64 not in (query.dtype, dtype):
        dtype = torch.get_autocast_dtype(query.device.type)
    if query.dtype == key.dtype == value.dtype == dtype:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def is_under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise ConfigError(f"{WHERE}: expected [B, H, S, D] tensors, got {shapes}. Unsqueeze them.")
    same_batch = query.shape[0] == key.shape[0] == value.shape[0]
    if (
        not same_batch
        or key.shape[1:3] != value.shape[1:3]
        or key.shape[1] == 0
        or query.shape[1] % key.shape[1]
        or query.shape[3] != key.shape[3]
    ):
        raise ConfigError(
            f"{WHERE}: expected query [B, H, S_q, D], key [B, H_kv, S_k, D] and value "
            f"[B, H_kv, S_k, D_v] with H a multiple of H_kv, got {shapes}. "
            "Check the order of heads and tokens."
        )
    if not all(x.is_floating_point() for x in (query, key, value)):
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise ConfigError(f"{WHERE}: expected floating-point tensors, got {dtypes}. Cast them.")


def _as_full_rank(attn_mask: Tensor | None, full: tuple[int, ...]) -> Tensor | None:
    """Give an attention mask four axes, each of size 1 or full."""
    if attn_mask is None:
        return None
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    fits = len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, full, strict=True))
    if not fits or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        raise ConfigError(
            f"{WHERE}: expected attn_mask broadcastable to {list(full)}, bool or floating point, "
            f"got {attn_mask.dtype} {list(attn_mask.shape)}. Key padding is [B, 1, 1, S_k]."
        )
    return attn_mask.reshape(shape)
