"""Select the key blocks worth visiting from pooled scores."""

from __future__ import annotations

from retrofit.kernels.block_select.select import pooled_scores, select_blocks, select_by_score

__all__ = ["pooled_scores", "select_blocks", "select_by_score"]
