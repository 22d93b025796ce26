"""One module for each recorded method."""

from __future__ import annotations

from tests.golden.cases import (
    clear,
    freeswim,
    hidiffusion,
    natten,
    pi3,
    sparse_vggt,
    t3,
    vggt,
)
from tests.golden.harness import Method

__all__ = ["METHODS"]

METHODS: list[Method] = [clear, freeswim, hidiffusion, natten, pi3, sparse_vggt, t3, vggt]
