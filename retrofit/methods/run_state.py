"""Where a denoising run stands: the step, the branch of guidance, and what methods derive from it.

All of it changes outside traced code, so that a compiled network only reads Python ints;
`retrofit.patching.schedulers` follows a pipeline's scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from retrofit.runtime.errors import ConfigError

Schedule = Callable[["RunState"], Mapping[str, int]]


class RunState:
    """Step, branch and derived integers of one patch; shared by all networks of a pipeline.

    Attributes:
        step: Index into the scheduler's timesteps, None while no run is known.
        num_steps: Number of timesteps of the whole schedule (2n - 1 for Heun).
        first_step: Where this run began, above 0 for image-to-image.
        branch: `cond`, `uncond`, or whatever name the pipeline gives its guidance pass.
        at_model_input: Whether the network is about to be called, as opposed to the step being
            known early; the one moment at which a schedule may draw from a global generator.
        values: Integers that methods derived for this step; all that traced code may read.
        store: Tensors kept from one call to a later one; dropped when a run begins or ends.
        acted: Whether something but attention was changed in an eager call (features halved, a row
            added); sites count their own.
    """

    def __init__(self) -> None:
        """Start outside any run."""
        self.step: int | None = None
        self.num_steps = 0
        self.first_step = 0
        self.branch = "cond"
        self.at_model_input = False
        self.values: dict[str, int] = {"known": 0}
        self.store: dict[str, Tensor] = {}
        self.acted = False
        self.schedules: list[Schedule] = []

    def begin(self, num_steps: int) -> None:
        """A new run of `num_steps` steps starts; nothing of an earlier one remains."""
        self.store.clear()
        self.branch = "cond"
        self.first_step = 0
        self.num_steps = num_steps
        self.enter(0)

    def begin_at(self, step: int) -> None:
        """The run starts at `step`, not at 0."""
        self.first_step = step
        self.enter(step)

    def enter(self, step: int, *, at_model_input: bool = False) -> None:
        """Go to a step; past the last one the run is over."""
        if step >= self.num_steps:
            self.end()
            return
        self.step = step
        self.at_model_input = at_model_input
        self._derive()

    def enter_branch(self, branch: str) -> None:
        """The next call of the network is for this guidance branch."""
        if branch != self.branch:
            self.branch = branch
            self._derive()

    def note_acted(self) -> None:
        """Something but attention is changed in this call; inside a graph it is not noted."""
        if not torch.compiler.is_compiling():
            self.acted = True

    def end(self) -> None:
        """No run is known any more."""
        self.step = None
        self.store.clear()
        self.values = {"known": 0}

    def at_step(self, step: int, num_steps: int, branch: str = "cond") -> None:
        """Say by hand where a run stands, for a loop without a pipeline.

        Raises:
            ConfigError: If `step` is not in `[0, num_steps)`.
        """
        if not 0 <= step < num_steps:
            raise ConfigError(
                f"at_step: expected 0 <= step < num_steps, got step {step} of {num_steps}. "
                "Steps count from 0."
            )
        if step == 0 and branch == "cond":
            self.store.clear()
        self.num_steps = num_steps
        self.branch = branch
        self.enter(step, at_model_input=True)

    def _derive(self) -> None:
        if self.step is None:
            return
        values = {"known": 1}
        for schedule in self.schedules:
            values.update(schedule(self))
        self.values = values
