"""What a family is: how to recognise an architecture by structure and describe it to methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from retrofit.sites import Network


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture, recognised by what it is made of and never by a model's name.

    Attributes:
        name: As in `retrofit families` and in recipes.
        summary: One line for people.
        examples: Public checkpoints of this family.
        recognises: Whether a module has this structure; must work on the meta device.
        describe: Its sites, levels and grids; must work on the meta device.
        denoises: Whether this is what a pipeline calls at every step, patched when a pipeline is.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    recognises: Callable[[nn.Module], bool]
    describe: Callable[[nn.Module], Network]
    denoises: bool = False


def has_parts(module: nn.Module, *names: str) -> bool:
    """Whether a module has all of these submodules or attributes, none of them None."""
    return all(getattr(module, name, None) is not None for name in names)
