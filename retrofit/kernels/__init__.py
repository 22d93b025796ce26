"""The operators' public functions and the choice of their backend."""

from __future__ import annotations

from retrofit.kernels._dispatch import backends, explain
from retrofit.kernels.block_select import pooled_scores, select_blocks, select_by_score
from retrofit.kernels.block_sparse import (
    BlockLists,
    block_sparse_attention,
    lists_from_mask,
    mask_from_lists,
    pack_mask_bits,
)
from retrofit.kernels.grid_window import (
    masked_attention,
    neighborhood_attention,
    window_attention,
)
from retrofit.kernels.merge import merge_attention

__all__ = [
    "BlockLists",
    "backends",
    "block_sparse_attention",
    "explain",
    "lists_from_mask",
    "mask_from_lists",
    "masked_attention",
    "merge_attention",
    "neighborhood_attention",
    "pack_mask_bits",
    "pooled_scores",
    "select_blocks",
    "select_by_score",
    "window_attention",
]
