"""What a comparison measures on outputs, by what they are: small lists that others add to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from retrofit.runtime.devices import to_float64

Better = Literal["lower", "higher"]
ROWS = 256  # of logits that are taken to float64 at once


@dataclass(frozen=True, kw_only=True)
class PairMetric:
    """A number for one input, from the dense output and the patched one.

    Attributes:
        name: Key in JSON, heading in tables.
        meaning: One line for people.
        better: Whether less or more of it is closer to dense.
        value: `value(dense, patched)`, both tensors of the same shape.
    """

    name: str
    meaning: str
    better: Better
    value: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, kw_only=True)
class GroupMetric:
    """A number for one input that depends on all of them (nearest neighbours).

    Attributes:
        name: Key in JSON, heading in tables.
        meaning: One line for people.
        better: Whether less or more of it is closer to dense.
        reduce: What it needs of an output, applied at once so that outputs need not be kept.
        values: `values(dense, patched)`, stacked reductions `[inputs, ...]`; one number an input.
        min_inputs: Fewer inputs than this say nothing, and the metric is left out.

    An input's number is one of few fractions, so tables show the mean over all.
    """

    name: str
    meaning: str
    better: Better
    reduce: Callable[[Tensor], Tensor]
    values: Callable[[Tensor, Tensor], list[float]]
    min_inputs: int


Metric = PairMetric | GroupMetric


def output_tensor(output: Any) -> Tensor:
    """The first floating tensor of a model's output (`sample`, `last_hidden_state`).

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError(f"expected an output with a floating tensor, got {type(output).__name__}")


def relative_error(dense: Tensor, patched: Tensor) -> float:
    """`||patched - dense|| / ||dense||` over all elements, in float64."""
    dense, patched = to_float64(dense), to_float64(patched)
    return float((patched - dense).norm() / dense.norm())


def cosine(dense: Tensor, patched: Tensor) -> float:
    """Cosine between the two outputs, each taken as one long vector, in float64."""
    dense, patched = to_float64(dense).flatten(), to_float64(patched).flatten()
    return float(functional.cosine_similarity(dense, patched, dim=0))


def mean_embedding(output: Tensor) -> Tensor:
    """Mean over the tokens of `[1, S, D]`, of length 1: `[D]`, as sentence encoders pool."""
    return functional.normalize(to_float64(output).mean(dim=1)[0], dim=0)


def embedding_cosine(dense: Tensor, patched: Tensor) -> float:
    """Cosine between the mean-pooled embeddings of two outputs `[1, S, D]`."""
    return float(mean_embedding(dense) @ mean_embedding(patched))


def neighbour_agreement(dense: Tensor, patched: Tensor, *, count: int) -> list[float]:
    """How many of an input's nearest neighbours stay its nearest neighbours.

    Args:
        dense: Embeddings of length 1, `[N, D]`, from the dense model.
        patched: The same inputs' from the patched model.
        count: Neighbours that are looked at; an input is not its own.

    Returns:
        For each input the fraction of its `count` nearest that are the same in both.
    """
    same = [
        len(set(a) & set(b)) / count
        for a, b in zip(_nearest(dense, count), _nearest(patched, count), strict=True)
    ]
    return same


def _nearest(embeddings: Tensor, count: int) -> list[list[int]]:
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(count, dim=1).indices.tolist()


def next_token_agreement(dense: Tensor, patched: Tensor) -> float:
    """How many of the likeliest next tokens of logits `[1, S, V]` stay the likeliest."""
    return float((dense.argmax(-1) == patched.argmax(-1)).double().mean())


def next_token_divergence(dense: Tensor, patched: Tensor) -> float:
    """Kullback-Leibler divergence of the next token, mean over tokens, in nats."""
    total = 0.0
    for a, b in zip(dense[0].split(ROWS), patched[0].split(ROWS), strict=True):
        a, b = to_float64(a).log_softmax(-1), to_float64(b).log_softmax(-1)
        total += float(functional.kl_div(b, a, reduction="sum", log_target=True))
    return max(0.0, total) / dense.shape[1]


def _neighbours(count: int) -> GroupMetric:
    def values(dense: Tensor, patched: Tensor) -> list[float]:
        return neighbour_agreement(dense, patched, count=count)

    return GroupMetric(
        name=f"neighbours_top{count}",
        meaning=f"fraction of the {count} nearest among the inputs that stay the nearest",
        better="higher",
        reduce=mean_embedding,
        values=values,
        min_inputs=4 * count,
    )


COMMON: tuple[Metric, ...] = (
    PairMetric(
        name="relative_error",
        meaning="size of the difference over the size of the dense output",
        better="lower",
        value=relative_error,
    ),
    PairMetric(
        name="cosine",
        meaning="cosine between the outputs; 1 is the same direction",
        better="higher",
        value=cosine,
    ),
)
EMBEDDINGS: tuple[Metric, ...] = (
    PairMetric(
        name="embedding_cosine",
        meaning="cosine between the mean-pooled embeddings",
        better="higher",
        value=embedding_cosine,
    ),
    _neighbours(1),
    _neighbours(5),
)
LOGITS: tuple[Metric, ...] = (
    PairMetric(
        name="next_token",
        meaning="fraction of the likeliest next tokens that stay the likeliest",
        better="higher",
        value=next_token_agreement,
    ),
    PairMetric(
        name="divergence",
        meaning="of the next token's distribution, in nats; about the rise of log perplexity",
        better="lower",
        value=next_token_divergence,
    ),
)
BY_OUTPUT: dict[str, tuple[Metric, ...]] = {
    "prediction": (),
    "embeddings": EMBEDDINGS,
    "logits": LOGITS,
}


def metrics_for(output: str, num_inputs: int) -> tuple[Metric, ...]:
    """The metrics of a `Family.output` that can be measured on so many inputs."""
    metrics = (*COMMON, *BY_OUTPUT[output])
    return tuple(
        metric
        for metric in metrics
        if isinstance(metric, PairMetric) or num_inputs >= metric.min_inputs
    )


def measure_group(
    metric: GroupMetric, dense: Sequence[Tensor], patched: Sequence[Tensor]
) -> list[float]:
    """Values of a group metric from the reductions of every input."""
    return metric.values(torch.stack(list(dense)), torch.stack(list(patched)))
