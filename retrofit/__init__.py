"""Replace the attention of a pretrained checkpoint, prove it, export it, undo it.

Importing this changes nothing anywhere, and imports no framework: the names below are loaded when
they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrofit.checkpoint.loading import load, patch_of
    from retrofit.checkpoint.saving import save, unpatch
    from retrofit.patching import Patch, patch
    from retrofit.recipe import Recipe

__version__ = "0.1.0"

__all__ = ["Patch", "Recipe", "load", "patch", "patch_of", "save", "unpatch"]

_HOME = {
    "Patch": "patching",
    "Recipe": "recipe",
    "load": "checkpoint.loading",
    "patch": "patching",
    "patch_of": "checkpoint.loading",
    "save": "checkpoint.saving",
    "unpatch": "checkpoint.saving",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use (PEP 562)."""
    if name in _HOME:
        return getattr(importlib.import_module(f"retrofit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'retrofit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
