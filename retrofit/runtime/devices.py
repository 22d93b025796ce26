"""Devices: which one to run on, and where a network is and in which dtype it computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from retrofit.runtime.errors import UnsupportedError


def main_parameter(module: nn.Module) -> Tensor:
    """A parameter of the dtype that most of a network's numbers have.

    The first one may be among the few that stay in float32 when all else is in half precision.
    """
    numbers: Counter[Any] = Counter()
    first: dict[Any, Tensor] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            numbers[parameter.dtype] += parameter.numel()
            first.setdefault(parameter.dtype, parameter)
    return first[numbers.most_common(1)[0][0]]


def pick_device(asked: str | None, *, fall_back: bool = False) -> str:
    """The device to run on: the GPU where there is one.

    Args:
        asked: What the user or a record says; None chooses.
        fall_back: Whether to take the CPU where `asked` is not here.

    Raises:
        UnsupportedError: If there is no such device.
    """
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
        if torch.device(asked).type == "cpu" and torch.device(asked).index:
            raise RuntimeError("there is one CPU")  # PyTorch takes any number
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if fall_back:
            return "cpu"
        reason = str(error).split("\n")[0]
        raise UnsupportedError(
            f"device {asked!r} can't be used here ({reason}). Use --device cpu; `retrofit doctor` "
            "says what there is."
        ) from error
    return asked
