"""Where a denoising run stands: the step, the branch of guidance, and what methods derive from it.

All of it changes outside traced code, where the scheduler *instance* is called, so that a compiled
network only reads Python ints. The order that was right for every scheduler tried: the scheduler's
own `_step_index`, else its `_begin_index`, else the entry of `timesteps` it is asked about.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import ConfigError

Schedule = Callable[["RunState"], Mapping[str, int]]
WATCHED = ("set_timesteps", "set_begin_index", "scale_model_input", "step")


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
        self._scheduler: weakref.ref[Any] | None = None
        self._pipeline: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a patched model keeps the integers, and follows no scheduler."""
        return {**self.__dict__, "_scheduler": None, "_pipeline": None, "store": {}}

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

    def attach(self, pipeline: Any) -> None:
        """Follow whatever scheduler a pipeline has, also when it is replaced later."""
        self._pipeline = weakref.ref(pipeline)
        self.keep_up()

    def keep_up(self, timestep: Any = None) -> None:
        """Follow the pipeline's present scheduler; called before every eager root call.

        Args:
            timestep: What the network is called with. A scheduler that was put in after patching
                has set its timesteps unseen: its run is taken up here, at this one.
        """
        pipeline = self._pipeline() if self._pipeline is not None else None
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None or self.follows(scheduler):
            return
        self.follow(scheduler)
        if timestep is not None and len(scheduler.timesteps):
            self.begin(len(scheduler.timesteps))
            value = timestep.max() if isinstance(timestep, Tensor) else timestep
            self.first_step = _current_step(scheduler, self, value)
            self.enter(self.first_step, at_model_input=True)

    def detach(self) -> None:
        """Leave pipeline and scheduler as they were found."""
        self._pipeline = None
        self.unfollow()

    def follow(self, scheduler: Any) -> None:
        """Attach to a scheduler instance; an earlier one is let go.

        Its `set_timesteps`, `set_begin_index`, `scale_model_input` and `step` become instance
        attributes that call the class's method and then tell this state; signatures are kept.
        """
        if self.follows(scheduler):
            return
        self.unfollow()
        for name in WATCHED:
            method = getattr(scheduler, name, None)
            if method is not None:
                watched = functools.partial(_watched_call, scheduler, self, name)
                watched.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
                watched.__doc__ = method.__doc__
                setattr(scheduler, name, watched)
        self._scheduler = weakref.ref(scheduler)

    def follows(self, scheduler: Any) -> bool:
        """Whether this state is attached to that instance."""
        return self._scheduler is not None and self._scheduler() is scheduler

    def unfollow(self) -> None:
        """Detach from the scheduler, which is left as it was found."""
        scheduler = self._scheduler() if self._scheduler is not None else None
        if scheduler is not None:
            for name in WATCHED:
                scheduler.__dict__.pop(name, None)
        self._scheduler = None


def _watched_call(scheduler: Any, state: RunState, name: str, /, *args: Any, **kwargs: Any) -> Any:
    result = getattr(type(scheduler), name)(scheduler, *args, **kwargs)
    if name == "set_timesteps":
        state.begin(len(scheduler.timesteps))
    elif name == "set_begin_index":
        state.begin_at(scheduler._begin_index or 0)
    elif name == "scale_model_input":
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        state.enter(_current_step(scheduler, state, timestep), at_model_input=True)
    else:
        own = getattr(scheduler, "_step_index", None)
        state.enter((state.step or 0) + 1 if own is None else own)
    return result


def _current_step(scheduler: Any, state: RunState, timestep: Any) -> int:
    """The index at a call of `scale_model_input`, which comes right before the network's."""
    for name in ("_step_index", "_begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    return nearest_step(scheduler.timesteps, float(timestep), state.step or 0)


def nearest_step(timesteps: Any, timestep: float, at_least: int = 0) -> int:
    """Index of the entry of `timesteps` nearest to a value, none before `at_least`.

    A value can stand there twice (PNDM, Heun), so a run only ever goes forward.
    """
    distances = [abs(float(t) - timestep) for t in timesteps][at_least:]
    return at_least + min(range(len(distances)), key=distances.__getitem__)
