"""What each backend of the selection says to a call."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels._dispatch import OPERATORS, Probe, Support, choose_backend
from retrofit.kernels._triton import triton_supports
from retrofit.kernels.block_select.native import native_supports

OPERATOR = "select_blocks"


def answers(probe: Probe) -> dict[str, Support]:
    """Whether each backend can run a call, in order of preference, and the reason if not."""
    return {
        # of the selection; pools are one pass of PyTorch's mean on a GPU
        "triton": triton_supports(probe.device, torch.float32, 1),
        "native": native_supports(probe.device, probe.dtype),
        "torch": (True, ""),
    }


OPERATORS[OPERATOR] = answers


def backend_for(x: Tensor, *others: Tensor) -> str:
    """The backend that runs a call: PyTorch while tracing, when a tensor holds no numbers."""
    if torch.compiler.is_compiling():
        return "torch"
    for y in (x, *others):
        if type(y) not in (Tensor, torch.nn.Parameter) or y.dtype != x.dtype:
            return "torch"
    probe = Probe(device=x.device.type, dtype=x.dtype, head_dim=x.shape[-1])
    return choose_backend(OPERATOR, probe)
