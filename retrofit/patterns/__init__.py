"""Patterns: which keys each query sees, as values; and attention by them."""

from __future__ import annotations

from retrofit.patterns.base import Attended, Dense, Pattern, attend, whole_mask
from retrofit.patterns.blocks import Blocks
from retrofit.patterns.call import AttentionCall
from retrofit.patterns.circle import Circle
from retrofit.patterns.compose import Halves, HeadShares, Mean, PerHead, Reused
from retrofit.patterns.everything import Everything
from retrofit.patterns.mask import Mask
from retrofit.patterns.windows import Neighborhood, Windows

__all__ = [
    "Attended",
    "AttentionCall",
    "Blocks",
    "Circle",
    "Dense",
    "Everything",
    "Halves",
    "HeadShares",
    "Mask",
    "Mean",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "Reused",
    "Windows",
    "attend",
    "whole_mask",
]
