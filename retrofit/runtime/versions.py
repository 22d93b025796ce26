"""Versions of the libraries that decide what a model computes."""

from __future__ import annotations

import platform

VERSION = "0.1.0"


def library_versions(*names: str) -> dict[str, str]:
    """Versions of Python and of those of the libraries that are installed."""
    from importlib import metadata  # 20 ms that importing the package should not take

    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def current_versions() -> dict[str, str]:
    """Versions of retrofit, of Python and of the libraries that decide what a model computes."""
    libraries = library_versions("torch", "diffusers", "transformers", "triton")
    return {"retrofit": VERSION, **libraries}
