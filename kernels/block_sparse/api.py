"""The public function: check what was given, choose a backend, run it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from retrofit.errors import ConfigError, suggest
from retrofit.kernels.block_sparse.lists import (
    BlockLists,
    check_block_mask,
    check_block_size,
    count_blocks,
)
from retrofit.kernels.block_sparse.plain import attend_plain
from retrofit.kernels.block_sparse.reference import attend_reference

WHERE = "block_sparse_attention"
BACKENDS = {"torch": attend_plain, "reference": attend_reference}


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
        backend: Name of the backend to use; None picks one.

    Returns:
        Output `[B, H, S_q, D_v]` in the dtype of `query`; with `return_lse` also `[B, H, S_q]`,
        float32 (float64 for float64 inputs).

    Raises:
        ConfigError: If shapes, dtypes or the backend's name do not fit.
    """
    block_size = check_block_size(block_size, WHERE)
    _check_tensors(query, key, value)
    lengths = query.shape[2], key.shape[2]
    blocks = count_blocks(lengths[0], block_size[0]), count_blocks(lengths[1], block_size[1])
    check_block_mask(block_mask, (query.shape[0], query.shape[1]), blocks, WHERE)
    attn_mask = _as_full_rank(attn_mask, (*query.shape[:3], lengths[1]))
    name = backend or "torch"
    if name not in BACKENDS:
        raise ConfigError(f"{WHERE}: no backend called {name!r}. {suggest(name, BACKENDS)}")
    out, lse = BACKENDS[name](
        query,
        key,
        value,
        block_mask,
        block_size=block_size,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    out = out.to(query.dtype)
    return (out, lse) if return_lse else out


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
