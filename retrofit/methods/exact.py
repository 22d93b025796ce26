"""Exact: dense attention by our kernels where they are faster than PyTorch's, nothing left out.

Paper: https://arxiv.org/abs/2205.14135 (attention in tiles, exact). Departure: on a CPU, with lists
of blocks that leave out what the call's own mask hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from retrofit.kernels.block_sparse.native import native_supports
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import check_at_least_one
from retrofit.patterns import AttentionCall, Dense, Everything, Pattern


@dataclass(frozen=True, kw_only=True)
class ExactConfig(Method):
    """Settings of exact attention.

    Attributes:
        min_tokens: Queries from which on our kernel takes the call; below, PyTorch's is as fast.
        on_gpu: Whether the Triton kernel takes calls on a GPU, where nothing was measured yet.
    """

    name: ClassVar[str] = "exact"
    summary: ClassVar[str] = "the dense model's own attention by faster kernels, nothing left out"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.14135"
    helps: ClassVar[str] = "on a CPU from 128 tokens on, in bfloat16 the most"
    idle: ClassVar[str] = (
        "PyTorch's attention is as fast for so few tokens, or no kernel is at hand"
    )
    acts_with: ClassVar[str] = "a smaller min_tokens"
    is_exact: ClassVar[bool] = True
    has_causal_form: ClassVar[bool] = True
    lossy: ClassVar[str] = "not lossy: the output is the dense model's within float rounding"

    min_tokens: int = 128
    on_gpu: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        return check_at_least_one("min_tokens", self.min_tokens)

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        """Takes every site."""
        return None

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """Everything, where a kernel of ours is faster; on meta as where tensors would go."""
        device = call.query.device.type
        on_cpu = device == "cpu" or (device == "meta" and not torch.accelerator.is_available())
        is_ours = _has_native(str(call.query.dtype)) if on_cpu else self.on_gpu
        if call.query.shape[2] < self.min_tokens or not is_ours:
            return Dense(layout)
        return Everything(layout=layout)


@torch.compiler.assume_constant_result
def _has_native(dtype: str) -> bool:
    """Whether the native kernel is there, and takes a dtype."""
    return native_supports("cpu", getattr(torch, dtype.removeprefix("torch.")), 1)[0]
