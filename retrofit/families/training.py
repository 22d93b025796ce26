"""What a family says of its training: what a sample becomes, and what one step is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """One batch, as the network takes it.

    Attributes:
        arguments: Of the network's forward, a row each sample.
        shared: Arguments that are the same for all samples, such as position ids.
        target: What the model's own loss compares the prediction with; None where it has none.
        weight: Of each sample, `[B]`, in every loss.
    """

    arguments: dict[str, Any]
    target: Tensor | None
    weight: Tensor
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a family is trained.

    Attributes:
        data: What its samples are.
        encode: Samples as tensors, one row each, made once and kept on disk. Called with what the
            network stands in (a pipeline, or the network and its tokenizer) and a batch of samples.
        sample: Samples that the dense model makes itself, as `encode` gives them, or None.
        draw: One step from rows and a generator: noise, times, captions that are left out.
        read: The prediction in what a forward returns.
        error: Of each sample, `[B]`, between two predictions.
        show: Pictures of captions, drawn with the network as it is, or None. Called with what the
            network stands in, captions and a seed.
        has_own_loss: Whether the model has a loss of its own beside the distance from the teacher.
    """

    data: Literal["captioned pictures", "texts"]
    encode: Callable[..., dict[str, Tensor]]
    draw: Callable[[Any, Mapping[str, Tensor], torch.Generator], Step]
    read: Callable[[Any], Tensor]
    error: Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
    has_own_loss: bool
    sample: Callable[..., dict[str, Tensor]] | None = None
    show: Callable[[Any, Sequence[str], int], list[Any]] | None = None


def squared_error(prediction: Tensor, other: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean squared difference of each sample, `[B]`, in float32."""
    return (prediction.float() - other.float()).square().flatten(1).mean(1)
