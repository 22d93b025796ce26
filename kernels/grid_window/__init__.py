"""Attention in windows of a token grid: neighborhoods, and partitions of every kind.

Papers: https://arxiv.org/abs/2504.16922 (generalized neighborhood attention),
https://arxiv.org/abs/2311.17528 (shifted windows of HiDiffusion),
https://arxiv.org/abs/2512.13492 (contiguous and strided boxes of T3).
"""

from __future__ import annotations

from .axes import first_key
from .functions import (
    branches_coincide,
    neighborhood_attention,
    pattern_attention,
    window_attention,
)
from .pattern import Pattern, neighborhood_pattern, window_pattern
from .reference import masked_attention, neighborhood_mask, window_mask

__all__ = [
    "Pattern",
    "branches_coincide",
    "first_key",
    "masked_attention",
    "neighborhood_attention",
    "neighborhood_mask",
    "neighborhood_pattern",
    "pattern_attention",
    "window_attention",
    "window_mask",
    "window_pattern",
]
