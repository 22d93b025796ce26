"""From the raw channels of a dense head to values and confidence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VALUE_ACTIVATIONS = (
    "exp",
    "inv_log",
    "linear",
    "norm",
    "norm_exp",
    "relu",
    "sigmoid",
    "xy_inv_log",
)
CONFIDENCE_ACTIVATIONS = ("expp0", "expp1", "sigmoid")


def activate_values(raw: Tensor, activation: str) -> Tensor:
    """Turn raw values into depth or points.

    Args:
        raw: Channels last, `[..., C]`.
        activation: `exp` (depth), `inv_log` (`sign(y) (e^|y| - 1)`, points), `linear`, `relu`,
            `sigmoid`, `norm` (unit length), `norm_exp` (length `e^|y| - 1`), `xy_inv_log` (a ray
            times an `inv_log` distance).

    Returns:
        Values of the same shape.
    """
    simple: dict[str, Callable[[Tensor], Tensor]] = {
        "exp": torch.exp,
        "inv_log": _inverse_log,
        "linear": torch.Tensor.contiguous,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
    }
    if activation in simple:
        return simple[activation](raw)
    if activation == "xy_inv_log":
        distance = _inverse_log(raw[..., 2:3])
        return torch.cat([raw[..., :2] * distance, distance], dim=-1)
    length = raw.norm(dim=-1, keepdim=True)
    if activation == "norm":
        return raw / length
    length = length.clamp(min=1e-8)
    return raw / length * torch.expm1(length)


def activate_confidence(raw: Tensor, activation: str) -> Tensor:
    """Turn a raw confidence channel into a positive weight (`expp1` is `1 + e^y`)."""
    if activation == "sigmoid":
        return torch.sigmoid(raw)
    return raw.exp() + 1 if activation == "expp1" else raw.exp()


def _inverse_log(raw: Tensor) -> Tensor:
    return torch.sign(raw) * torch.expm1(raw.abs())
