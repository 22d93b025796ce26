"""Choice of key blocks under an attention mask: what is hidden is neither pooled nor chosen."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import select_by_score
from retrofit.patterns.call import visible_keys
from retrofit.patterns.everything import visible_blocks
from retrofit.runtime.devices import widest_float

Selection = Literal["mass", "error"]


def choose_under_mask(  # noqa: PLR0913 - the arguments of `select_blocks` and a mask
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    block_size: tuple[int, int],
    keep: float | None,
    mass: float | None,
    pooling: Literal["avg", "max"],
    scale: float | None,
    selection: Selection = "mass",
) -> Tensor:
    """As `retrofit.kernels.select_blocks`, among the blocks that the mask shows.

    `keep` is a fraction of the blocks that a query block can see at all, so that a text keeps the
    same blocks whatever it is padded to. Where the mask differs from query to query, the blocks
    that hold a query block's own tokens are kept too, lest a query see nothing.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`, the same tokens.
        mask: bool (True is seen) or added to the scores, `[B or 1, H or 1, S or 1, S]`.
        block_size: Query and key tokens per block.
        keep: Fraction of the visible blocks, or None.
        mass: Cumulated softmax mass, or None.
        pooling: "avg" or "max".
        scale: Factor on the products, `D ** -0.5` when None.
        selection: Blocks of the most `mass`, or those whose mean is worst for them (`error`): mass
            times the variance that a block's scores have, were keys and queries uncorrelated.

    Returns:
        bool `[B, H, ceil(S / block_q), ceil(S / block_k)]`.
    """
    block_q, block_k = block_size
    real = visible_keys(mask)
    pooled_q, pooled_k = _pool(query, real, block_q, pooling), _pool(key, real, block_k, pooling)
    pooled_k = pooled_k.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = pooled_q @ pooled_k.transpose(-1, -2)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scores * factor
    if selection == "error":
        scores = scores + _score_variance(query, key, real, block_size, factor).log()
    visible = visible_blocks(mask, block_size)
    scores = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
    wanted = visible.sum(-1, keepdim=True).to(widest_float(mask.device)) * (keep or 0.0)
    ranked = scores.masked_fill(~visible, -1.0).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(ranked.shape[-1], device=ranked.device)
    chosen = (places < wanted.floor().clamp(min=1)).expand_as(ranked)
    chosen = torch.zeros_like(chosen).scatter(-1, ranked, chosen)
    if mass is not None:
        chosen = chosen | select_by_score(scores, mass=mass)
    if mask.shape[2] > 1:
        rows_differ = (mask != mask[:, :, :1]).any()
        chosen = chosen | (_own_blocks(chosen, block_size) & rows_differ)
    return chosen & visible


def _score_variance(
    query: Tensor, key: Tensor, real: Tensor, block_size: tuple[int, int], scale: float
) -> Tensor:
    """Variance of a query's scores over a key block, mean over a query block, `[B, H, n_q, n_k]`.

    The channels of a block's keys are taken as uncorrelated.
    """
    mean = _pool(key, real, block_size[1], "avg")
    square = _pool(key.to(mean.dtype).square(), real, block_size[1], "avg")
    spread = (square - mean.square()).clamp(min=0)
    strength = _pool(query.to(mean.dtype).square(), real, block_size[0], "avg")
    spread = spread.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (strength @ spread.mT * scale**2).clamp(min=torch.finfo(mean.dtype).tiny)


def _pool(x: Tensor, real: Tensor, block: int, pooling: str) -> Tensor:
    """Pool the visible tokens of each block, `[B, H, S, D]` to `[B, H, ceil(S / block), D]`."""
    missing = -x.shape[2] % block
    shown = pad(real, (0, missing)).unflatten(1, (-1, block))[:, None, :, :, None]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block))  # [B, H, n, block, D]
    if pooling == "avg":
        return (x * shown).sum(3) / shown.sum(3).clamp(min=1)
    return x.masked_fill(~shown, -math.inf).amax(3).masked_fill(~shown.any(3), 0.0)


def _own_blocks(chosen: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Key blocks that share a token with a query block, bool `[n_q, n_k]`."""
    (block_q, block_k), device = block_size, chosen.device
    first = torch.arange(chosen.shape[2], device=device)[:, None] * block_q
    start = torch.arange(chosen.shape[3], device=device) * block_k
    return (start < first + block_q) & (start + block_k > first)
