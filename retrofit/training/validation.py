"""How good a network is on held-out rows: its own loss, and how far it is from the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from retrofit.families.training import Step, Training
from retrofit.training.rows import Rows, count_rows, take

SEED = 7919  # added to the request's, so that held-out noise is no training noise


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over the held-out rows.

    Attributes:
        loss: The model's own loss; None where it has none.
        weighted: The same with the weights of training.
        error: Distance from the dense model's predictions, weighted as in training.
    """

    loss: float | None
    weighted: float | None
    error: float

    def objective(self, kind: str) -> float:
        """What training lowers, on these rows."""
        own = self.weighted or 0.0
        return {"denoise": own, "distill": self.error}.get(kind, own + self.error)

    def recovered(self, before: Scores, dense: Scores) -> dict[str, float]:
        """Which part of what the patch cost is won back, by measure; 1 is the dense model."""
        shares = {}
        for name in ("loss", "weighted", "error"):
            start, now, goal = (asdict(s)[name] for s in (before, self, dense))
            if start is not None and start > goal:
                shares[name] = (start - now) / (start - goal)
        return shares


class Validator:
    """Held-out rows with noise and times that stay the same from look to look."""

    def __init__(
        self, owner: Any, training: Training, buckets: tuple[Rows, ...], *, batch: int, seed: int
    ) -> None:
        """Fix what is drawn; `dense` is filled by the first look at the teacher."""
        self.owner, self.training, self.buckets = owner, training, buckets
        self.batch, self.seed = batch, seed
        self.reference: list[Tensor] = []

    def look_at_teacher(self, predict: Callable[[Step], Tensor], device: Any) -> Scores:
        """The dense model's scores; its predictions are what others are compared with."""
        self.reference = [predict(step).float().cpu() for step in self._steps(device)]
        return self._score(iter(self.reference), device)

    def look(self, predict: Callable[[Step], Tensor], device: Any) -> Scores:
        """Scores of a network."""
        return self._score((predict(step) for step in self._steps(device)), device)

    def _steps(self, device: Any) -> Iterator[Step]:
        for index, rows in enumerate(self.buckets):
            for start in range(0, count_rows(rows), self.batch):
                generator = torch.Generator().manual_seed(self.seed + SEED + 1000 * index + start)
                part = take(rows, slice(start, start + self.batch), device)
                yield self.training.draw(self.owner, part, generator)

    def _score(self, predictions: Iterator[Tensor], device: Any) -> Scores:
        losses: list[Tensor] = []
        weighted: list[Tensor] = []
        errors: list[Tensor] = []
        error = self.training.error
        for step, prediction, reference in zip(
            self._steps(device), predictions, self.reference, strict=True
        ):
            prediction = prediction.to(device)
            distance = error(prediction, reference.to(device), step.arguments)
            errors.append(step.weight * distance)
            if step.target is not None:
                own = error(prediction, step.target, step.arguments)
                losses.append(own)
                weighted.append(step.weight * own)
        return Scores(loss=_mean(losses), weighted=_mean(weighted), error=_mean(errors) or 0.0)


def _mean(values: list[Tensor]) -> float | None:
    return torch.cat(values).double().mean().item() if values else None
