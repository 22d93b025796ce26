"""Whether the tensors of a checkpoint's files have the shapes that its config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.checkpoints.headers import TensorInfo
from retrofit.checkpoints.weights import read_header

if TYPE_CHECKING:
    from torch import nn

LISTED = 3  # tensors in a message


def describe_mismatch(network: nn.Module, files: Iterable[Path]) -> str | None:
    """What does not fit, as the middle of an error message, or None if all that is known does.

    Args:
        network: Built from the config, on meta or not.
        files: Its weights. Names that only one of both has are not looked at.
    """
    stored = _by_own_name({k: v for file in files for k, v in read_header(file).items()}, network)
    wrong = [
        (name, tuple(tensor.shape), stored[name].shape)
        for name, tensor in network.state_dict().items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    if not wrong:
        return None
    name, expected, found = wrong[0]
    others = ", ".join(other for other, _, _ in wrong[1:LISTED])
    more = f" ({len(wrong) - 1} more, such as {others})" if others else ""
    return (
        f"{name}: expected shape {list(expected)} as its config says, got {list(found)} in its "
        f"weights{more}"
    )


def _by_own_name(stored: Mapping[str, TensorInfo], network: nn.Module) -> Mapping[str, TensorInfo]:
    """Names with or without the prefix that transformers gives the body of a model with a head."""
    prefix = getattr(network, "base_model_prefix", "")
    if not prefix:
        return stored
    found = dict(stored)
    for name, info in stored.items():
        found.setdefault(name.removeprefix(f"{prefix}."), info)
        found.setdefault(f"{prefix}.{name}", info)
    return found
