"""FlexAttention: compiled once for every kind of input, and block lists as it takes them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=4)
def compiled_flex(mode: str) -> Any:
    """FlexAttention through the compiler; it compiles anew for every kind of input."""
    from torch.nn.attention.flex_attention import flex_attention

    # every shape that was not seen takes a compile of its own, and here that is meant
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, mode=None if mode == "default" else mode, dynamic=False)


def flex_lists(block_mask: Tensor, block_size: tuple[int, int], seq_len: int) -> Any:
    """FlexAttention's block mask with whole blocks only."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = lists_of(block_mask)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=block_size,
        mask_mod=None,
        seq_lengths=(seq_len, seq_len),
    )


def lists_of(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number and positions of the kept blocks of each row, int32, kept ones first."""
    counts = block_mask.sum(-1, dtype=torch.int32)
    indices = block_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts, indices.to(torch.int32)
