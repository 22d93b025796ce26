"""Selection on a GPU: one program per row of scores, no sort."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.block_select.native import RULES

MAX_COLUMNS = 16384


def select_by_triton(scores: Tensor, fewest: Tensor, limit: Tensor | None, crossing: str) -> Tensor:
    """Best entries of each row.

    Args:
        scores: float32 `[B, H, n_q, n_k]`, at most `MAX_COLUMNS` columns; not negative where
            there is a limit.
        fewest: Entries that are kept whatever the mass, int64 `[B, H]`.
        limit: What the cumulated mass is compared with, float32 `[B, H]`, or None.
        crossing: What happens to the entry that crosses it.

    Returns:
        bool, the shape of `scores`.
    """
    from .triton_kernel import select_kernel

    scores, fewest = scores.contiguous(), fewest.contiguous()
    limit = None if limit is None else limit.contiguous()
    kept = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    *leading, columns = scores.shape
    block = max(16, 1 << (columns - 1).bit_length())
    select_kernel[(leading[0] * leading[1] * leading[2],)](
        scores,
        kept,
        fewest,
        limit,
        leading[2],
        columns,
        BLOCK=block,
        RULE=RULES[crossing],
        HAS_LIMIT=limit is not None,
        num_warps=min(8, max(1, block // 256)),
    )
    return kept.view(torch.bool)
