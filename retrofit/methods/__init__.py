"""Attention methods: one file for each paper, found by being here."""

from __future__ import annotations

import importlib
import pkgutil

from retrofit.methods.base import Method

__all__ = ["METHODS", "Method"]


def _find_methods() -> dict[str, type[Method]]:
    """Every config in the files of this folder, by its name."""
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    configs = [
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Method) and hasattr(item, "name")
    ]
    return {config.name: config for config in sorted(configs, key=lambda config: config.name)}


METHODS: dict[str, type[Method]] = _find_methods()
