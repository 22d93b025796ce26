"""What all handlers of one patch share: whether it is on, and who watches."""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.layout.sites import AttentionSite
from retrofit.patterns import AttentionCall, Pattern
from retrofit.runtime.intercept import Forward, Handler


class Observer:
    """Watches the eager calls of patched sites; everything that is measured is measured so."""

    def on_start(self, site: AttentionSite) -> None:
        """Before a call."""

    def on_call(
        self, site: AttentionSite, call: AttentionCall, pattern: Pattern, out: Tensor
    ) -> None:
        """After a call: what came in, by which pattern it was made, and what comes out."""


class Control:
    """The switch of a patch, and its observers.

    Attributes:
        is_enabled: Whether the model runs patched now.
        was_enabled: Whether it did in the latest forward with gradients, whose checkpointed parts a
            backward runs again: one state for each backward.
        observers: Told of every eager call of a patched site.
    """

    def __init__(self) -> None:
        """Start switched on, watched by nobody."""
        self.is_enabled = True
        self.was_enabled = True
        self.observers: list[Observer] = []

    def __getstate__(self) -> dict[str, object]:
        """A copy of a patched model is watched by nobody."""
        return {**self.__dict__, "observers": []}

    def is_on(self) -> bool:
        """Whether the call that is running now runs patched."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return self.is_enabled
        return self.was_enabled  # inside a backward: a checkpointed part runs again

    def note_forward(self) -> None:
        """An eager forward of the network begins."""
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self.was_enabled = self.is_enabled


class Switched:
    """A method's handler, left out while its patch is switched off."""

    def __init__(self, handler: Handler, control: Control) -> None:
        """Guard a handler."""
        self.handler = handler
        self.control = control

    def __call__(self, inner: Forward, /, *args: object, **kwargs: object) -> object:
        """Run it, or what is inside it."""
        if not self.control.is_on():
            return inner(*args, **kwargs)
        return self.handler(inner, *args, **kwargs)
