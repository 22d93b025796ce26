"""Architectures, recognised by structure: one file each."""

from __future__ import annotations

from torch import nn

from retrofit.errors import UnsupportedError
from retrofit.families import encoder, pi3, unet2d, vggt, vit, wan
from retrofit.families.base import Family

__all__ = ["FAMILIES", "Family", "find_family", "require_family"]

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (encoder, vit, unet2d, wan, vggt, pi3)
}


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
