"""Replace the attention of a pretrained checkpoint, prove it, export it, undo it.

Importing this changes nothing anywhere, and imports no framework: the names below are loaded when
they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from retrofit.runtime import versions as _versions

__version__ = _versions.VERSION

if TYPE_CHECKING:
    from retrofit.artifact.loading import load, patch_of
    from retrofit.artifact.saving import save, unpatch
    from retrofit.patching.patch import Patch, patch
    from retrofit.patching.recipe import Recipe


__all__ = ["Patch", "Recipe", "load", "patch", "patch_of", "save", "unpatch"]

_HOME = {
    "Patch": "patching.patch",
    "Recipe": "patching.recipe",
    "load": "artifact.loading",
    "patch": "patching.patch",
    "patch_of": "artifact.loading",
    "save": "artifact.saving",
    "unpatch": "artifact.saving",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use (PEP 562)."""
    if name in _HOME:
        return getattr(importlib.import_module(f"retrofit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'retrofit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
