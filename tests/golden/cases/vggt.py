"""VGGT: our network, dense."""

from __future__ import annotations

from torch import Tensor

from tests.architectures import golden_vggt
from tests.golden.harness import Meta, Tensors

NAMES = ("VGGT", "vggt")
TOLERANCE = (
    ("stages/*", "stages/*"),
    ("global1/*", "global1/*"),
    ("outputs/*", "outputs/*"),
)
INPUTS: tuple[str, ...] = ()
CHECKED: tuple[str, ...] = ()


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """All tensors of the case."""
    return golden_vggt.reproduce(meta, dict(tensors), dict(weights))
