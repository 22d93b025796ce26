"""The loss of a method's gates: against what the dense attention of each site really weighs."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.layout.sites import AttentionSite
from retrofit.patching.control import Observer
from retrofit.patching.patch import Patch
from retrofit.patterns import AttentionCall, Pattern


class GateObserver(Observer):
    """Collects the gate loss of every patched call; gradients reach the gates only.

    Attributes:
        losses: One number a call that has a gate.
    """

    def __init__(self, patch: Patch) -> None:
        """Watch a patch."""
        self.patch = patch
        self.losses: list[Tensor] = []

    def on_call(
        self, site: AttentionSite, call: AttentionCall, pattern: Pattern, out: Tensor
    ) -> None:
        """Add the loss of one call."""
        for rule in self.patch.sites[call.where].rules:
            if rule.learned is not None:
                seen = call.in_one_dtype().with_full_mask()
                with torch.enable_grad():
                    detached = AttentionCall(
                        query=seen.query.detach(),
                        key=seen.key.detach(),
                        value=seen.value.detach(),
                        attn_mask=seen.attn_mask,
                        scale=seen.scale,
                        learned=rule.learned,
                    )
                    self.losses.append(rule.method.gate_loss(pattern.layout, detached))

    def mean(self) -> Tensor:
        """Over all calls."""
        return torch.stack(self.losses).mean()
