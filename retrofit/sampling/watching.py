"""Watch the denoising network of a pipeline: how long its calls take, and whether they are finite.

The times of a patched run and one dense call on the same inputs give what the patch saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrofit.runtime.devices import Device
from retrofit.runtime.errors import NonFiniteError
from retrofit.runtime.finite import find_nonfinite, is_finite
from retrofit.runtime.timing import NOISE, now, timed

AGAIN = 3  # dense calls at the end, at most
SHORT = 1.0  # seconds that these may take however short the run was
FEW = 4  # calls below which a run says nothing of time
ALIKE = 0.05  # part of the dense time by which two runs of the same work differ
DTYPES = "Try --dtype float32 or bfloat16 instead of float16."


@dataclass(frozen=True, kw_only=True)
class TimeSaved:
    """A patched run's denoising against the same run dense.

    Attributes:
        calls: Of the denoising network.
        patched_seconds: All of them, by `Watch.settled_seconds`.
        dense_call_seconds: Mean of the dense calls on the inputs of the last, after the run.
        dense_calls: How many these were.
        dense_spread: The longest less the shortest of them, as a part of their median.
        is_crowded: Whether other programs wanted the cores too.
    """

    calls: int
    patched_seconds: float
    dense_call_seconds: float
    dense_calls: int = 1
    dense_spread: float = 0.0
    is_crowded: bool = False

    @property
    def dense_seconds(self) -> float:
        """All calls, had they been dense."""
        return self.calls * self.dense_call_seconds

    @property
    def seconds(self) -> float:
        """What the patch saved; below 0 where it cost more than it saved."""
        return self.dense_seconds - self.patched_seconds

    @property
    def fraction(self) -> float:
        """The same as a part of the dense time."""
        return self.seconds / self.dense_seconds

    @property
    def verdict(self) -> Literal["saved", "lost", "alike", "few", "busy"]:
        """What may be said of it: `alike` where it is no more than equal runs differ by."""
        if self.calls < FEW:
            return "few"
        if self.is_crowded or self.dense_spread > NOISE:
            return "busy"
        if abs(self.fraction) <= max(ALIKE, self.dense_spread):
            return "alike"
        return "saved" if self.seconds > 0 else "lost"


@dataclass(kw_only=True)
class Watch:
    """Hooks on a denoising network.

    Attributes:
        network: It.
        name: Its component, for messages.
        step: Index of the present step.
        num_steps: Of the run.
        seconds: Of every call.
        keep_last: Whether to hold on to the inputs of the last step's call.
        last: Those inputs.
    """

    network: nn.Module
    name: str
    step: int = 0
    num_steps: int = 0
    seconds: list[float] = field(default_factory=list)
    keep_last: bool = False
    last: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    _started: float = 0.0
    _device: Device = "cpu"
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Watch:
        """Hook in."""
        self._handles = [
            self.network.register_forward_pre_hook(self._before, with_kwargs=True),
            self.network.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Unhook."""
        for handle in self._handles:
            handle.remove()

    def begin(self, num_steps: int) -> None:
        """A run begins."""
        self.step, self.num_steps, self.last = 0, num_steps, None

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.keep_last and self.step == self.num_steps - 1:
            self.last = args, kwargs
        self._device = _device_of(args, kwargs)
        self._started = now(self._device)

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.seconds.append(now(self._device) - self._started)
        if not is_finite(output):
            self._blame(args, kwargs)

    def _blame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run once more to name the first module whose result is not finite."""
        where = f"at step {self.step} of {self.num_steps}"
        if not all(map(is_finite, (*args, *kwargs.values()))):
            raise NonFiniteError(
                f"{self.name}: got NaN or infinity as input {where}: the step before or the text "
                f"encoder overflowed. {DTYPES}"
            )
        with self._paused():
            found = find_nonfinite(self.network, lambda: self.network(*args, **kwargs))
        site = f"{self.name}.{found}" if found else self.name
        raise NonFiniteError(f"{site}: NaN or infinity {where}. {DTYPES}")

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def settled_seconds(self) -> float:
        """All calls; the first also prepares libraries, and counts no more than the second."""
        first, *others = self.seconds
        return min([first, *others[:1]]) + sum(others)

    def time_last_again(self) -> list[float]:
        """Seconds of further calls on the last step's inputs, as the network is now.

        One call, and up to `AGAIN` while they take less than a tenth of the run, or `SHORT`.
        """
        assert self.last is not None  # noqa: S101 - the caller has looked
        args, kwargs = self.last
        taken: list[float] = []
        device = _device_of(args, kwargs)
        room = max(SHORT, sum(self.seconds) / 10)
        while not taken or (len(taken) < AGAIN and sum(taken) + taken[0] < room):
            with torch.no_grad():
                taken.append(timed(lambda: self.network(*args, **kwargs), device)[1])
        return taken


def watch_denoiser(pipeline: Any) -> Watch:
    """A watch on the network that a pipeline calls at every step."""
    name = "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"
    return Watch(network=getattr(pipeline, name), name=name)


def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Device:
    """Where the inputs are."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), "cpu")
