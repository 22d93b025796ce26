"""Follow a file's tensors through a library's conversion: which of them is in which result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Traced(Tensor):
    """A tensor that knows which of a file's tensors it was made of; so do all made of it."""

    sources: frozenset[str] = frozenset()
    read: set[str] | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and hand the names on; one that gives numbers has read them."""
        result = super().__torch_function__(func, types, args, kwargs or {})
        inputs = list(_traced((args, kwargs)))
        names = frozenset().union(*(tensor.sources for tensor in inputs))
        made = list(_traced(result))
        for tensor in made:
            tensor.sources = names
            tensor.read = next((one.read for one in inputs if one.read is not None), None)
        if isinstance(result, (int, float)) and not isinstance(result, bool):
            for tensor in inputs:
                if tensor.read is not None:
                    tensor.read |= tensor.sources
        return result


def trace(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The same tensors, traced, and the set to which names are added whose numbers are read."""
    read: set[str] = set()
    traced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        one = tensor.as_subclass(Traced)
        one.sources, one.read = frozenset((name,)), read
        traced[name] = one
    return traced, read


def trace_header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes without numbers, traced."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return trace(empty)[0]


def sources_of(tensor: Any) -> frozenset[str]:
    """Names of the file's tensors in it."""
    return tensor.sources if isinstance(tensor, Traced) else frozenset()


def _traced(value: Any) -> Iterator[Traced]:
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _traced(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _traced(item)
