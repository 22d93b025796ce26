"""Where a network is and in which dtype it computes, read from its parameters."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn


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
