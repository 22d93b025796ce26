"""Pool queries and keys per block, score the pairs, keep the best blocks of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from retrofit.kernels.block_select.backends import backend_for
from retrofit.kernels.block_select.native import (
    pool_natively,
    score_natively,
    select_natively,
)
from retrofit.kernels.block_select.triton_route import MAX_COLUMNS, select_by_triton
from retrofit.kernels.block_sparse.lists import check_block_size
from retrofit.kernels.block_sparse.plain import counted_rows
from retrofit.runtime.errors import ConfigError

Pooling = Literal["avg", "max"]
Crossing = Literal["drop", "keep", "keep-strict"]
Fraction = float | Sequence[float] | Tensor

# Slack of the cumulated mass, so that a mass of 1 keeps every block in spite of rounding.
MASS_EPS = 1e-5
# Scores held at once while selecting.
CHUNK_BYTES = 32 * 2**20


def pooled_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_size: tuple[int, int] = (128, 64),
    pooling: Pooling = "avg",
    scale: float | None = None,
) -> Tensor:
    """Softmax over key blocks of the products of pooled queries and pooled keys.

    Paper: https://arxiv.org/abs/2509.07120 (block-sparse global attention).

    Args:
        query: `[B, H, S_q, D]`.
        key: `[B, H_kv, S_k, D]`; `H_kv` divides `H`.
        block_size: Query and key tokens that are pooled into one; a short last block is pooled
            over the tokens that it has.
        pooling: "avg", or "max" per channel.
        scale: Factor on the products, `D ** -0.5` when None.

    Returns:
        float32 (float64 for float64 inputs) `[B, H, ceil(S_q / block_q), ceil(S_k / block_k)]`,
        rows sum to 1.

    Raises:
        ConfigError: If an argument does not fit.
    """
    block_q, block_k = _check_call(query, key, block_size, pooling, "pooled_scores")
    backend = backend_for(query, key)
    pooled_q = _pool(query, block_q, pooling, backend)
    pooled_k = _pool(key, block_k, pooling, backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _score(pooled_q, pooled_k, scale, backend)


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_size: tuple[int, int] = (128, 64),
    keep: Fraction | None = None,
    mass: Fraction | None = None,
    pooling: Pooling = "avg",
    crossing: Crossing = "drop",
    min_blocks: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Choose the key blocks that each query block attends to, from pooled scores.

    Per query block the key blocks are ordered by `pooled_scores`, equal ones by position, and the
    first `n` are kept: `int(n_k * keep)`, or as many as `mass` of the softmax needs, or the larger
    where both are given, and never fewer than `min_blocks`. So `mass=0` alone, or a `keep` below
    `1 / n_k`, keeps `min_blocks`. With the paper's settings `keep = 1 - sparse_ratio` and
    `mass = cdf_threshold`.

    Paper: https://arxiv.org/abs/2509.07120 (block-sparse global attention).

    Args:
        query: `[B, H, S_q, D]`.
        key: `[B, H_kv, S_k, D]`; `H_kv` divides `H`.
        block_size: Query and key tokens per block.
        keep: Fraction of key blocks that is kept, 0 < keep <= 1; one value, or one per head (`[H]`
            or `[B, H]`).
        mass: Cumulated softmax mass that is kept, 0 <= mass <= 1; likewise.
        pooling: "avg", or "max" per channel.
        crossing: What happens to the block with which the cumulated mass passes `mass`: "drop"
            (mass at most `mass`, the paper's rule), "keep" (mass at least `mass`), or
            "keep-strict" (mass above `mass`).
        min_blocks: Fewest blocks per row.
        scale: Factor on the products, `D ** -0.5` when None.

    Returns:
        bool `[B, H, ceil(S_q / block_q), ceil(S_k / block_k)]`, True where a block is kept.

    Raises:
        ConfigError: If an argument does not fit, or neither `keep` nor `mass` is given.
    """
    where = "select_blocks"
    block_q, block_k = _check_call(query, key, block_size, pooling, where)
    heads = query.shape[0], query.shape[1]
    keep = _check_fraction(keep, "keep", heads, where, query.device)
    mass = _check_fraction(mass, "mass", heads, where, query.device)
    _check_rule(keep, mass, crossing, min_blocks, where)
    backend = backend_for(query, key)
    pooled_q = _pool(query, block_q, pooling, backend)
    pooled_k = _pool(key, block_k, pooling, backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # a sort needs about five times the scores
    row_bytes = 20 * counted_rows(heads[0]) * heads[1] * pooled_k.shape[2]
    step = max(1, CHUNK_BYTES // row_bytes)
    parts = [
        _select(
            _score(pooled_q[:, :, i : i + step], pooled_k, scale, backend),
            keep,
            mass,
            crossing,
            min_blocks,
            backend,
        )
        for i in range(0, pooled_q.shape[2], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def select_by_score(
    scores: Tensor,
    *,
    keep: Fraction | None = None,
    mass: Fraction | None = None,
    crossing: Crossing = "drop",
    min_blocks: int = 1,
) -> Tensor:
    """Choose blocks from scores that were made elsewhere; the rule is that of `select_blocks`.

    Args:
        scores: `[B, H, n_q, n_k]`, higher is better; with `mass`, rows that sum to 1.
        keep: As in `select_blocks`.
        mass: As in `select_blocks`.
        crossing: As in `select_blocks`.
        min_blocks: Fewest blocks per row.

    Returns:
        bool, the shape of `scores`.

    Raises:
        ConfigError: If an argument does not fit, or neither `keep` nor `mass` is given.
    """
    where = "select_by_score"
    heads = scores.shape[0], scores.shape[1]
    keep = _check_fraction(keep, "keep", heads, where, scores.device)
    mass = _check_fraction(mass, "mass", heads, where, scores.device)
    _check_rule(keep, mass, crossing, min_blocks, where)
    return _select(scores, keep, mass, crossing, min_blocks, backend_for(scores))


def _pool(x: Tensor, block: int, pooling: Pooling, backend: str) -> Tensor:
    """Pool tokens per block in float32 or wider: `[B, H, S, D]` to `[B, H, ceil(S / block), D]`."""
    if backend == "native":
        return pool_natively(x, block, pooling)
    length = x.shape[2]
    whole = length // block * block
    parts = []
    if whole:
        parts.append(_pool_axis(x[:, :, :whole].unflatten(2, (-1, block)), 3, pooling))
    if whole < length:
        parts.append(_pool_axis(x[:, :, whole:], 2, pooling).unsqueeze(2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _pool_axis(x: Tensor, axis: int, pooling: Pooling) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.mean(dim=axis, dtype=wide) if pooling == "avg" else x.amax(dim=axis).to(wide)


def _score(pooled_q: Tensor, pooled_k: Tensor, scale: float, backend: str) -> Tensor:
    if backend == "native":
        return score_natively(pooled_q, pooled_k, scale)
    batch, heads, num_q, dim = pooled_q.shape
    kv_heads = pooled_k.shape[1]
    stacked = pooled_q.reshape(batch, kv_heads, -1, dim)
    scores = stacked @ pooled_k.transpose(-1, -2) * scale
    return scores.softmax(dim=-1).view(batch, heads, num_q, -1)


def _select(
    scores: Tensor,
    keep: float | Tensor | None,
    mass: float | Tensor | None,
    crossing: Crossing,
    min_blocks: int,
    backend: str,
) -> Tensor:
    num_k = scores.shape[-1]
    least = min(min_blocks, num_k)
    if isinstance(keep, float):
        least = max(least, int(num_k * keep))
    shape = scores.shape[:2]
    fewest = torch.full((*shape, 1, 1), least, dtype=torch.int64, device=scores.device)
    if isinstance(keep, Tensor):
        fewest = fewest.maximum((keep * num_k).floor().long())
    limit = None
    if mass is not None:
        limit = torch.as_tensor(mass, dtype=scores.dtype, device=scores.device)
        limit = limit + MASS_EPS if crossing == "drop" else limit
    # both kernels read float32; other scores, and very long rows, are sorted
    is_long = backend == "triton" and num_k > MAX_COLUMNS
    if backend != "torch" and scores.dtype == torch.float32 and not is_long and scores.numel():
        limit = None if limit is None else limit.expand(*shape, 1, 1).reshape(shape)
        select = select_by_triton if backend == "triton" else select_natively
        return select(scores, fewest.view(shape), limit, crossing)
    ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    counts = fewest
    if limit is not None:
        counts = counts.maximum(_count_mass(ordered, limit, crossing))
    chosen = (torch.arange(num_k, device=scores.device) < counts).expand(scores.shape)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def _count_mass(ordered: Tensor, limit: Tensor, crossing: Crossing) -> Tensor:
    cumulated = ordered.cumsum(dim=-1)
    if crossing == "drop":
        return (cumulated <= limit).sum(dim=-1, keepdim=True)
    before = torch.nn.functional.pad(cumulated[..., :-1], (1, 0))
    short = before < limit if crossing == "keep" else before <= limit
    return short.sum(dim=-1, keepdim=True)


def _check_call(
    query: Tensor, key: Tensor, block_size: tuple[int, int], pooling: str, where: str
) -> tuple[int, int]:
    sizes = check_block_size(block_size, where)
    if pooling not in ("avg", "max"):
        raise ConfigError(f"{where}: expected pooling 'avg' or 'max', got {pooling!r}. Use 'avg'.")
    fits = query.dim() == key.dim() == 4 and query.shape[0] == key.shape[0]
    if not fits or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ConfigError(
            f"{where}: expected query [B, H, S_q, D] and key [B, H_kv, S_k, D] with H a multiple "
            f"of H_kv, got {list(query.shape)} and {list(key.shape)}. "
            "Check the order of heads and tokens."
        )
    if 0 in (query.shape[2], key.shape[2]):
        raise ConfigError(f"{where}: expected at least one token, got none. Skip the call.")
    return sizes


def _check_fraction(
    value: Fraction | None, name: str, heads: tuple[int, int], where: str, device: torch.device
) -> float | Tensor | None:
    """Return a float, or a float64 tensor that broadcasts over `[B, H, n_q, n_k]`."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and 0 < value <= 1:
        return float(value)  # the common case, without a tensor
    place = value.device if isinstance(value, Tensor) else "cpu"  # also where meta is the default
    given = torch.as_tensor(value, dtype=torch.float64, device=place)
    wanted = "0 < keep <= 1" if name == "keep" else "0 <= mass <= 1"
    low = given > 0 if name == "keep" else given >= 0
    if not bool((low & (given <= 1)).all()):
        raise ConfigError(
            f"{where}: expected {wanted}, got {value}. It is the fraction that stays, 1 is dense."
        )
    if given.dim() == 0:
        return float(given)
    shape = (1,) * (2 - given.dim()) + tuple(given.shape)
    if len(shape) != 2 or any(n not in (1, full) for n, full in zip(shape, heads, strict=True)):
        raise ConfigError(
            f"{where}: expected {name} to be one number or one per head ({heads[1]}), got shape "
            f"{list(given.shape)}. Give a list with one value per head."
        )
    return given.reshape(*shape, 1, 1).to(device)


def _check_rule(
    keep: float | Tensor | None,
    mass: float | Tensor | None,
    crossing: str,
    min_blocks: int,
    where: str,
) -> None:
    if keep is None and mass is None:
        raise ConfigError(f"{where}: expected keep or mass, got neither. keep=1.0 is dense.")
    if crossing not in ("drop", "keep", "keep-strict"):
        raise ConfigError(
            f"{where}: expected crossing 'drop', 'keep' or 'keep-strict', got {crossing!r}. "
            "The paper's rule is 'drop'."
        )
    if min_blocks < 0:
        raise ConfigError(f"{where}: expected min_blocks >= 0, got {min_blocks}. Use 1.")
