"""Combine partial attention results by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.kernels.block_sparse.plain import softmax_and_lse
from retrofit.runtime.errors import ConfigError

__all__ = ["merge_attention"]


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    Each part is a softmax over its own keys; weighting parts by `exp(lse)` gives the softmax over
    the union. Parts that saw nothing (lse -inf) weigh nothing; where no part saw anything the
    result is zeros and -inf. Sets that overlap count their common keys twice.

    Args:
        outs: Outputs `[B, H, S, D]`, one per part (or stacked on a leading axis).
        lses: Natural log-sum-exp `[B, H, S]` of the same parts.

    Returns:
        Output in the dtype of `outs`, and the log-sum-exp of the union.

    Raises:
        ConfigError: If there is no part, or a log-sum-exp does not fit its output.
    """
    outs, lses = list(outs), list(lses)
    fits = len(outs) == len(lses) > 0 and all(
        out.shape == outs[0].shape and lse.shape == out.shape[:-1]
        for out, lse in zip(outs, lses, strict=False)
    )
    if not fits:
        raise ConfigError(
            "merge_attention: expected as many lses [B, H, S] as outs [B, H, S, D], all alike, got "
            f"{[list(x.shape) for x in outs]} and {[list(x.shape) for x in lses]}. "
            "Ask each part for return_lse=True."
        )
    weights, total = softmax_and_lse(torch.stack(lses, dim=-1))
    merged = torch.zeros_like(outs[0], dtype=torch.promote_types(outs[0].dtype, total.dtype))
    for out, weight in zip(outs, weights.split(1, dim=-1), strict=True):
        merged = merged + out * weight
    return merged.to(outs[0].dtype), total
