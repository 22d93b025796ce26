"""How a training runs, and what it came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from retrofit.training.validation import Scores

Report = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a training runs, which changes nothing of its result.

    Attributes:
        device: Where; several processes take one each.
        resume: Go on from the newest state.
        force: Replace an earlier result.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        report: Told of progress: what is done, steps done, steps in all.
        time_limit: Seconds after which it stops with a state.
        tracker: `tensorboard` or `wandb`, through accelerate.
    """

    device: str = "cpu"
    resume: bool = False
    force: bool = False
    trust_remote_code: bool = False
    report: Report = _silent
    time_limit: float | None = None
    tracker: str | None = None


ALONE = Running()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training came to.

    Attributes:
        weights: What learned, by name in the network, on the CPU.
        dense: Scores of the dense model.
        looks: Scores by step; the first is of step 0.
        seconds: Of the steps of this process, looks and states aside.
        steps_run: How many those are.
    """

    weights: dict[str, Tensor]
    dense: Scores
    looks: dict[int, Scores]
    seconds: float
    steps_run: int

    @property
    def last(self) -> Scores:
        """Scores at the end."""
        return self.looks[max(self.looks)]

    @property
    def recovered(self) -> dict[str, float]:
        """Which part of what the patch cost was won back, by measure."""
        return self.last.recovered(self.looks[0], self.dense)
