"""Follow a pipeline's scheduler, which says where a denoising run stands.

The *instance* is watched, outside traced code. The order that was right for every scheduler tried:
its own `_step_index`, else its `_begin_index`, else the entry of `timesteps` it is asked about.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

from torch import Tensor

from retrofit.methods.run_state import RunState

WATCHED = ("set_timesteps", "set_begin_index", "scale_model_input", "step")


class ScheduledState(RunState):
    """A run state that is told of every step by the scheduler of a pipeline."""

    def __init__(self) -> None:
        """Start outside any run, following nothing."""
        super().__init__()
        self._scheduler: weakref.ref[Any] | None = None
        self._pipeline: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a patched model keeps the integers, and follows no scheduler."""
        return {**self.__dict__, "_scheduler": None, "_pipeline": None, "store": {}}

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
