"""CLEAR: its masks; there is no method that uses them yet."""

from __future__ import annotations

from torch import Tensor

from retrofit.grid import TokenGrid
from retrofit.kernels.grid_window.circles import circular_mask
from tests.golden.harness import Meta, Tensors

NAMES = ("CLEAR", "clear")
TOLERANCE = (("out/*", "out"), ("inner/*", "inner"))
INPUTS: tuple[str, ...] = ()
CHECKED: tuple[str, ...] = ()


def unsupported(name: str) -> str | None:
    """The attention processors need a method and the family of FLUX."""
    if name.startswith(("out/", "inner/")):
        return "there is no CLEAR method and no FLUX family yet"
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """A mask; nothing for the rest."""
    info = meta["mask_info"].get(name)
    if info is None:
        return {}
    grid = TokenGrid(height=info["h"], width=info["w"], num_prefix_tokens=info["text"])
    return {name: circular_mask(grid, info["window_size"], pool=info.get("down_factor"))}
