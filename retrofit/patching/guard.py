"""The outermost handler of a patched network: its run state, its overlap, its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.patching.control import Control
from retrofit.patching.observers import FiniteObserver
from retrofit.patching.schedulers import ScheduledState
from retrofit.patching.sites import AttendAtSite
from retrofit.runtime.errors import NonFiniteError, RetrofitError
from retrofit.runtime.finite import is_finite
from retrofit.runtime.intercept import Forward


class GuardRoot:
    """Outermost handler of a network: its run state, its overlap, its output.

    Attributes:
        where: Name of the network, for messages.
        installed: The recipe and the report of the patch, from which `patch_of` makes a handle.
        calls: Eager calls so far.
        needs_steps: Name of a method that must know the denoising step; empty if none must.
    """

    def __init__(
        self,
        *,
        where: str,
        state: ScheduledState,
        methods: Sequence[Method],
        sites: list[AttendAtSite],
        control: Control,
    ) -> None:
        """Guard a network and the handlers of its patched sites."""
        self.installed: tuple[Any, Any] | None = None
        self.where = where
        self.state = state
        self.methods = tuple(methods)
        self.sites = sites
        self.control = control
        self.busy = False
        self.calls = 0
        rules = [rule for site in sites for rule in site.rules]
        by_step = [rule.method.name for rule in rules if rule.switch]
        needing = [method.name for method in self.methods if method.needs_steps]
        self.needs_steps = next(iter([*needing, *by_step]), "")

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Raises:
            NonFiniteError: If its output is not finite; the message names the first site to blame.
            RetrofitError: If it is called while it runs, or without a step where one is needed.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.control.note_forward()
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            self.state.keep_up(timestep)
        if self.needs_steps and self.control.is_on() and not self.state.values["known"]:
            raise RetrofitError(
                f"{self.where}: {self.needs_steps} must know the denoising step. Patch the "
                "pipeline rather than the bare network (again, if it is compiled and its scheduler "
                "was replaced), or call `patch.at_step(i, n)` before each call."
            )
        if compiling:
            return inner(*args, **kwargs)
        if self.busy:
            raise RetrofitError(
                f"{self.where}: called while an earlier call is still running. A patched model "
                "serves one call at a time: give every thread its own copy."
            )
        self.busy = True
        self.calls += 1
        try:
            out = inner(*args, **kwargs)
            if not is_finite(out):
                self._blame(inner, args, kwargs)
        finally:
            self.busy = False
        return out

    def _blame(self, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run again, looking at every site, to name the first whose result is not finite."""
        if not all(is_finite(value) for value in (*args, *kwargs.values())):
            raise NonFiniteError(f"{self.where}: got NaN or infinity as input{_at(self.state)}.")
        watching = FiniteObserver(_at(self.state))
        self.control.observers.append(watching)
        try:
            inner(*args, **kwargs)
        finally:
            self.control.observers.remove(watching)
        raise NonFiniteError(
            f"{self.where}: NaN or infinity{_at(self.state)}, though every patched site is "
            "finite: it arises elsewhere. Try float32 or bfloat16 instead of float16."
        )


def _at(state: RunState) -> str:
    """Where a run stands; nothing for a network that has no steps."""
    return "" if state.step is None else f" at step {state.step} of {state.num_steps}"
