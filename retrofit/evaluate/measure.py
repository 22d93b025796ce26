"""Run one input of a comparison and time it, and say on what machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrofit.evaluate.metrics import output_tensor
from retrofit.evaluate.truth import TrueScene
from retrofit.patching.networks import FoundNetwork, find_networks
from retrofit.patching.patch import Patch
from retrofit.runtime.devices import device_name, main_parameter
from retrofit.runtime.timing import timed
from retrofit.runtime.versions import current_versions


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """One call of a network.

    Attributes:
        arguments: Keyword arguments of its forward, on the CPU.
        step: Index of the denoising step and their number, for networks that denoise.
        branch: `cond` or `uncond`, for guidance by two calls.
    """

    arguments: Mapping[str, Any]
    step: tuple[int, int] | None = None
    branch: str = "cond"


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """One input of a comparison: a text, a picture, or a short denoising schedule.

    Attributes:
        name: For tables.
        calls: The calls made for it, in order; the outputs are compared together.
        network: Name of the network in its pipeline; empty for a single network.
        tokens: Tokens of its largest attention call, where known.
        whole: Whether to run the target itself, heads and all, and not the network inside it.
        truth: What is known of a scene, for the numbers of `Row.truth`.
    """

    name: str
    calls: tuple[ModelCall, ...]
    network: str = ""
    tokens: int | None = None
    whole: bool = False
    truth: TrueScene | None = None


def find_network(target: Any, name: str, components: tuple[str, ...] = ()) -> FoundNetwork:
    """The network of a target that an input is for.

    Args:
        target: An `nn.Module` or a pipeline.
        name: As in `ModelInput.network`.
        components: As for `find_networks`.
    """
    found = find_networks(target, components)
    return next((network for network in found if network.name == name), found[0])


def find_module(target: Any, item: ModelInput, components: tuple[str, ...] = ()) -> torch.nn.Module:
    """What an input is run on: the target itself, or one of its networks."""
    return target if item.whole else find_network(target, item.network, components).module


def run_input(module: torch.nn.Module, item: ModelInput, handle: Patch | None) -> Tensor:
    """Call a network as an input says.

    Returns:
        The first floating tensor of every call's output, flattened behind the batch and joined
        when there are several calls; as it is when there is one.
    """
    outputs = []
    place = main_parameter(module)
    for call in item.calls:
        if handle is not None and call.step is not None:
            handle.at_step(*call.step, branch=call.branch)
        arguments = {k: _to(v, place) for k, v in call.arguments.items()}
        outputs.append(output_tensor(module(**arguments)))
    return outputs[0] if len(outputs) == 1 else torch.cat([o.flatten(1) for o in outputs], dim=1)


def time_input(
    module: torch.nn.Module, item: ModelInput, handle: Patch | None
) -> tuple[Tensor, float]:
    """The output for an input, and the seconds it took."""
    device = main_parameter(module).device
    return timed(lambda: run_input(module, item, handle), device)


def _to(value: Any, place: Tensor) -> Any:
    """Tensors on a parameter's device, floating ones in its dtype; containers likewise."""
    if isinstance(value, Tensor):
        return value.to(place.device, place.dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _to(item, place) for key, item in value.items()}
    return value


def describe_machine(module: torch.nn.Module) -> dict[str, Any]:
    """Device, dtype, versions, threads: what every report of a time must say."""
    place = main_parameter(module)
    return {
        "device": device_name(place.device),
        "dtype": str(place.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": current_versions(),
    }
