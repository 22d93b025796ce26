"""Tiles of Triton programs, and those of the kernels of gradients."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """Tile of a program, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """Options of the compiler; fused products and sums are not a default of every version."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return {**options, "enable_fp_fusion": True}


def choose_query_launch(head_dim: int, element_size: int, capability: int) -> Launch:
    """Settings for gradients of queries: no spills up to 128 channels; not tuned on a device yet.

    Args:
        head_dim: Of keys or values, the larger.
        element_size: Bytes of an element.
        capability: Of the device, times ten: 90 for an H100.
    """
    if element_size == 4:
        return Launch(32, 16, 4, 1) if head_dim <= 64 else Launch(16, 16, 8, 1)
    if head_dim > 128:
        return Launch(64, 16, 8, 2)
    if head_dim > 64:
        return Launch(64, 32, 4 if capability >= 90 else 8, 2)
    return Launch(128, 64, 8, 2)


def choose_key_launch(head_dim: int, element_size: int, capability: int) -> Launch:
    """The same for gradients of keys and values, which hold two sums at once."""
    if element_size == 4:
        # left alone the compiler keeps to 64 registers and spills
        return Launch(16, 16, 4, 1) if head_dim <= 64 else Launch(16, 16, 8, 1, 128)
    if head_dim > 128:
        return Launch(32, 16, 8, 2)
    if head_dim > 64:
        return Launch(64, 16, 8, 2)
    return Launch(64, 32, 8, 2) if capability >= 90 else Launch(64, 32, 4, 1)
