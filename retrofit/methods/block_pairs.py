"""How many blocks there are, and how many pairs of tokens are in those that are kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.runtime.devices import widest_float


def count_blocks(length: int, block: int) -> int:
    """Blocks that so many tokens are cut into; the last may be short."""
    return -(-length // block)


def count_pairs(
    block_map: Tensor,
    rows: Tensor,
    shown: Tensor,
    *,
    block_size: tuple[int, int],
    has_means: bool,
) -> Tensor:
    """Query-key pairs of the kept blocks, mean over heads, float64 where there is it, `[B]`.

    Args:
        block_map: Blocks kept, bool `[B, H, n_q, n_k]`.
        rows: Queries that count, bool `[B, S_q]`.
        shown: Keys that count, bool `[B, S_k]`.
        block_size: Query and key tokens of a block.
        has_means: Whether a dropped block counts as one key.
    """
    num_q, num_k = (_sums(x, block) for x, block in zip((rows, shown), block_size, strict=True))
    seen = block_map * num_k[:, None, None]
    if has_means:
        seen = torch.where(block_map, seen, (num_k > 0)[:, None, None].to(seen.dtype))
    return (seen * num_q[:, None, :, None]).sum((2, 3)).mean(1)


def _sums(x: Tensor, block: int) -> Tensor:
    """Sums per block, `[B, S]` to floats `[B, ceil(S / block)]`."""
    return (
        pad(x.to(widest_float(x.device)), (0, -x.shape[1] % block)).unflatten(1, (-1, block)).sum(2)
    )
