"""Attention methods: one file for each paper."""

from __future__ import annotations

from retrofit.methods.base import Method, Operator
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.freeswim import FreeSwimConfig
from retrofit.methods.hidiffusion import HiDiffusionConfig
from retrofit.methods.neighborhood import NeighborhoodConfig
from retrofit.methods.t3 import T3Config
from retrofit.methods.window import WindowConfig

__all__ = ["METHODS", "Method", "Operator"]

METHODS: dict[str, type[Method]] = {
    config.name: config
    for config in (
        BlockSparseConfig,
        FreeSwimConfig,
        HiDiffusionConfig,
        NeighborhoodConfig,
        T3Config,
        WindowConfig,
    )
}
