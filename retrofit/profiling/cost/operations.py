"""Operations at one size: what they are called, work, bytes, and what their rate depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
OURS = ("block_sparse_attention", "grid_window")


@dataclass(frozen=True)
class Operation:
    """One operation at one size.

    Attributes:
        kind: `product`, `convolution`, `attention` (dense), `sparse`, or `memory`.
        name: Of the operator.
        family: What its rate depends on; operations of one family share one rate.
        flops: Of one execution; 0 for `memory`.
        num_bytes: Read and written by one execution.
    """

    kind: str
    name: str
    family: tuple[Any, ...]
    flops: float
    num_bytes: float

    @property
    def amount(self) -> float:
        """What its time grows with."""
        return self.flops or self.num_bytes

    @property
    def point(self) -> float | None:
        """Its amount where a family's rate depends on that: where weights are read."""
        return self.amount if self.kind in ("product", "convolution") else None


@dataclass(frozen=True)
class Example:
    """Arguments on meta with which an operation ran."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def without_storage(example: Example) -> Example:
    """The same arguments in tensors of their own, so that those of the call can be let go."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_meta:
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    with _disable_current_modes():
        args, kwargs = tree_map(copy, (example.args, dict(example.kwargs)))
    return Example(example.function, tuple(args), kwargs)


def attention_operation(
    query: Tensor, key: Tensor, value: Tensor, *, masked: bool = False
) -> Operation:
    """Dense attention as an operation; its rate depends on how many keys there are."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    num_keys = round(math.log2(max(1, key.shape[-2])))
    # few queries take PyTorch's small tiles
    family = ("attention", query.dtype, query.shape[-1], masked, min(query.shape[-2], 1024) // 256)
    return Operation(
        kind="attention",
        name="scaled_dot_product_attention",
        family=(*family, num_keys),
        flops=2.0 * pairs * (query.shape[-1] + value.shape[-1]),
        num_bytes=float(sum(bytes_of(x) for x in (query, key, value)) + bytes_of(query)),
    )


def describe(func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> Operation:
    """An executed operator as an operation."""
    packet = func.overloadpacket
    name = packet.__name__
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    num_bytes = float(sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs)))
    formula = flop_registry.get(packet)
    flops = 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))
    dtype = outputs[0].dtype
    kind: str = "memory"
    family: tuple[Any, ...] = ("memory", name, dtype)
    if name in PRODUCTS and flops:
        kind, family = "product", ("product", name, dtype, *inputs[-1].shape[-2:])
        if name in ("bmm", "baddbmm"):  # of which there are many side by side
            family = (*family, min(inputs[-2].shape[-2], 512) // 128)
    elif name == "convolution":
        weight, rest = args[1], args[3:]
        kind, family = "convolution", ("convolution", dtype, tuple(weight.shape), repr(rest))
    elif name in OURS:
        kind, family = "sparse", _our_family(name, args, dtype)
    elif flops:
        kind, family = "product", ("product", name, dtype)
    return Operation(kind=kind, name=name, family=family, flops=flops, num_bytes=num_bytes)


def _our_family(name: str, args: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the rate of one of our operators depends on: its pattern, not its heads."""
    dim = args[0].shape[-1]
    if name == "grid_window":
        return ("sparse", name, dtype, dim, tuple(args[5]), tuple(args[6]))
    listed = len(args[3]) > 1
    visited = args[3][0].shape[-1] if listed else None
    return ("sparse", name, dtype, dim, args[5], args[6], args[0].shape[-2], listed, visited)


def bytes_of(x: Tensor) -> float:
    """Of its elements, whatever its strides."""
    return x.numel() * x.element_size()
