"""Devices: which one to run on, what it is called, and in which dtype a network on it computes.

Whatever accelerator PyTorch was built for is meant, by `torch.accelerator`: CUDA, ROCm, XPU, MPS.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.runtime.errors import UnsupportedError
from retrofit.runtime.machine import processor_name

Device = str | torch.device


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
    """The device to run on: the accelerator where there is one.

    Args:
        asked: What the user or a record says; None chooses.
        fall_back: Whether to take the CPU where `asked` is not here.

    Raises:
        UnsupportedError: If there is no such device.
    """
    if asked is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if accelerator is None else accelerator.type
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


def on_accelerator(device: Device) -> bool:
    """Whether a device computes beside the CPU, which does not wait for it."""
    return torch.device(device).type not in ("cpu", "meta")


def synchronize(device: Device) -> None:
    """Wait until a device has done all that it was given."""
    if on_accelerator(device):
        torch.accelerator.synchronize(device)


def device_name(device: Device) -> str:
    """As reports name it: the card's or the processor's name, `mps` for what has no other."""
    if not on_accelerator(device):
        return processor_name()
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return torch.device(device).type if ask is None else str(ask(device))


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none: MPS, and some XPUs."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def to_float64(x: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its own device has none."""
    return (x if widest_float(x.device) is torch.float64 else x.cpu()).double()
