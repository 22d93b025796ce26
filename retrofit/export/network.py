"""A patched network as an exporter takes it: tensors in by name, a tuple of tensors out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.artifact.planning import Plan
from retrofit.checkpoints.opening import load_networks
from retrofit.families.examples import InputSize
from retrofit.patching.networks import FoundNetwork, find_networks
from retrofit.patching.patch import Patch, patch
from retrofit.profiling.inspection import AskedSize, network_size
from retrofit.runtime.devices import main_parameter
from retrofit.runtime.errors import UnsupportedError

BETWEEN = "/"  # in the name of a tensor that lies in a mapping
FORCE = "RETROFIT_BACKEND"


class Exported(nn.Module):
    """A network behind tensors by name.

    Arguments that are no tensors are constants of the graph.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], constants: Mapping[str, Any]
    ) -> None:
        """Hold the network, and say the names of its inputs, which exporters read."""
        super().__init__()
        self.network = network
        self.constants = dict(constants)
        named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]

        def forward(*given: Any, **inputs: Any) -> tuple[Tensor, ...]:
            """Every floating tensor that the network puts out, in order."""
            inputs |= dict(zip(names, given, strict=False))
            return tuple(floating_tensors(self.network(**inputs, **self.constants)))

        forward.__signature__ = Signature(named)  # type: ignore[attr-defined]
        self.forward = forward


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded network with its patch, and inputs of the size that is exported.

    Attributes:
        plan: Of the patch.
        network: What is exported.
        handle: Its patch, installed.
        size: Of the inputs.
        inputs: Tensors by name, seeded.
        constants: Arguments that are no tensors.
        dtype: Of the weights.
    """

    plan: Plan
    network: FoundNetwork
    handle: Patch
    size: InputSize
    inputs: dict[str, Any]
    constants: dict[str, Any]
    dtype: str

    @property
    def module(self) -> Exported:
        """What an exporter takes."""
        return Exported(self.network.module, list(self.inputs), self.constants)

    def run(self) -> tuple[Tensor, ...]:
        """The eager output as the patch stands."""
        with torch.no_grad():
            return self.module(**self.inputs)


def open_subject(
    plan: Plan,
    asked: AskedSize,
    *,
    device: str,
    dtype: str | None = None,
    batch: int = 1,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Subject:
    """Load what a plan is for, and draw inputs.

    Args:
        plan: Of the patch.
        asked: Size in pixels, frames and tokens; what is left out is the network's own.
        device: Where it runs while it is exported.
        dtype: Of the weights; None keeps the checkpoint's own.
        batch: Rows of the inputs.
        seed: Of the inputs.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        UnsupportedError: If it can't be exported, by name.
    """
    target = load_networks(
        plan.checkpoint,
        plan.components,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    handle = patch(target, plan.recipe)
    network = find_networks(target, plan.recipe.components)[0]
    if network.family.inputs is None:
        raise UnsupportedError(f"family {network.family.name} has no example inputs to export.")
    size = network_size(plan.checkpoint, network, asked)
    drawn = network.family.inputs.make(network.module, size, torch.Generator().manual_seed(seed))
    if "input_ids" in drawn:  # whoever runs it pads texts
        drawn["attention_mask"] = torch.ones_like(drawn["input_ids"])
    like = main_parameter(network.module)
    inputs = {name: _place(value, like, batch) for name, value in drawn.items()}
    network.module.eval().requires_grad_(False)
    return Subject(
        plan=plan,
        network=network,
        handle=handle,
        size=size,
        inputs={n: x for n, x in inputs.items() if isinstance(x, (Tensor, dict))},
        constants={n: x for n, x in inputs.items() if not isinstance(x, (Tensor, dict))},
        dtype=str(like.dtype).removeprefix("torch."),
    )


@contextmanager
def plain_operators() -> Iterator[None]:
    """While entered, patterns are computed by PyTorch's own operators: no kernel is in a graph."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def flatten(inputs: Mapping[str, Any], above: str = "") -> dict[str, Tensor]:
    """Tensors by one name, mappings within taken apart."""
    flat: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{above}{name}{BETWEEN}")
        else:
            flat[above + name] = value
    return flat


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in an output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floating_tensors(item)


def _place(value: Any, like: Tensor, batch: int) -> Any:
    """An input where the network is, in its dtype, in as many rows as asked."""
    if isinstance(value, dict):
        return {name: _place(item, like, batch) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    dtype = like.dtype if value.is_floating_point() else value.dtype
    if batch > 1 and value.ndim and value.shape[0] == 1:
        value = value.repeat(batch, *[1] * (value.ndim - 1))
    return value.to(like.device, dtype)
