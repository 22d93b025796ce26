"""Architectures, recognised by structure: one file each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn

from retrofit.families.base import Family
from retrofit.runtime.errors import UnsupportedError

__all__ = ["FAMILIES", "Family", "find_family", "require_family"]


def _find_families() -> dict[str, Family]:
    """The `FAMILY` of every file in this folder that has one, by its name."""
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    return {module.FAMILY.name: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


FAMILIES: dict[str, Family] = _find_families()


def find_family(module: nn.Module) -> Family | None:
    """The family whose structure a module has, if there is one."""
    return next((family for family in FAMILIES.values() if family.recognises(module)), None)


def require_family(module: nn.Module, where: str) -> Family:
    """The family of a module.

    Raises:
        UnsupportedError: If it has the structure of none.
    """
    family = find_family(module)
    if family is None:
        known = ", ".join(f"{f.name} ({f.summary})" for f in FAMILIES.values())
        raise UnsupportedError(
            f"{where}: {type(module).__name__} has the structure of no known family. "
            f"Known: {known}. CONTRIBUTING.md shows how to add one in one file."
        )
    return family
