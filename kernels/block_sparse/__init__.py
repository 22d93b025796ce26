"""Attention over a list of key blocks per query block."""

from __future__ import annotations

from retrofit.kernels.block_sparse.api import block_sparse_attention
from retrofit.kernels.block_sparse.lists import (
    BlockLists,
    lists_from_mask,
    mask_from_lists,
    pack_mask_bits,
)

__all__ = [
    "BlockLists",
    "block_sparse_attention",
    "lists_from_mask",
    "mask_from_lists",
    "pack_mask_bits",
]
