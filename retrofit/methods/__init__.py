"""Attention methods: one file for each paper."""

from __future__ import annotations

from retrofit.methods.base import Method, Operator
from retrofit.methods.freeswim import FreeSwimConfig
from retrofit.methods.hidiffusion import HiDiffusionConfig

__all__ = ["METHODS", "Method", "Operator"]

METHODS: dict[str, type[Method]] = {
    config.name: config for config in (FreeSwimConfig, HiDiffusionConfig)
}
