"""NaN and infinity: see them in what a module gives, and find the module that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_finite(value: Any) -> bool:
    """Whether the first floating tensor of a value is finite; true for anything without one."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.is_meta or not value.numel():
            return True
        extremes = torch.stack(torch.aminmax(value.detach()))  # NaN wins in both; one pass
        return bool(torch.isfinite(extremes).all())
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value:
        return is_finite(value[0])
    return True


def find_nonfinite(network: nn.Module, run: Callable[[], object]) -> str | None:
    """Path of the innermost and earliest module whose result is not finite while `run` runs.

    Args:
        network: Whose modules are watched.
        run: Calls it.

    Returns:
        The path, empty for the network itself; None if every result is finite.
    """
    found: list[str] = []
    with _noting(network, found):
        run()
    return found[0] if found else None


@contextmanager
def _noting(network: nn.Module, found: list[str]) -> Iterator[None]:
    def note(path: str, output: Any) -> None:
        if not is_finite(output):
            found.append(path)

    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
        for path, module in network.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
