"""What patching a checkpoint would change: predicted time and memory, from its configs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.opening import build_networks, check_weights, dtype_to_run
from retrofit.patching.networks import FoundNetwork, find_networks
from retrofit.patching.patch import PatchReport, patch
from retrofit.patching.recipe import Recipe
from retrofit.profiling.cost.dtypes import set_dtype
from retrofit.profiling.cost.kept import kept_by
from retrofit.profiling.cost.network_plan import NetworkPlan, cost_of, seconds_of
from retrofit.profiling.cost.rates import Rates, measure_rates
from retrofit.profiling.cost.sizes import AtSize, trace_sizes
from retrofit.profiling.inspection import AskedSize, NetworkReport, inspect_checkpoint
from retrofit.runtime.errors import CheckpointError, InputError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What patching would change, network by network.

    Attributes:
        networks: Those that the method changes.
        recipe: What would be patched.
        report: Sites that would be.
        steps: Denoising steps that costs are means over, 1 for other networks.
        device: Where rates were measured.
        dtype: Of weights and activations.
        rates: What was measured.
    """

    networks: tuple[NetworkPlan, ...]
    recipe: Recipe
    report: PatchReport
    steps: int
    device: str
    dtype: str
    rates: Rates

    @property
    def keep_measured(self) -> float | None:
        """Mean share of the query-key pairs that patched networks keep, None if not known."""
        kept = [network.kept.needed for network in self.networks if network.kept is not None]
        known = [needed for needed in kept if needed is not None]
        return sum(known) / len(known) if known and len(known) == len(kept) else None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan.

    Attributes:
        what: A method's name or a recipe.
        parameters: Settings that replace its own.
        sites: Globs instead of its own.
        components: Networks of a pipeline.
        asked: Size of the input.
        steps: Denoising steps of a run.
        device: Where it would run.
        dtype: Of the weights; None takes what the checkpoint's own would be run in, float32 if it
            has none.
        trust_remote_code: Whether code that comes with the checkpoint may run.
    """

    what: Recipe | str
    parameters: Mapping[str, Any]
    asked: AskedSize
    sites: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    steps: int = 20
    device: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False


def plan_checkpoint(
    checkpoint: Checkpoint, request: Request, *, progress: Progress | None = None
) -> Plan:
    """Predict a checkpoint's cost, dense and patched.

    Nothing of the checkpoint is run: its networks are built on meta, and a few seconds of
    measurement tell how fast this machine runs operations of their shapes.

    Args:
        checkpoint: Its configs are read, and the dtype of its weights where they are at hand.
        request: What to plan.
        progress: Called as `progress(what, done, total)`.

    Raises:
        InputError: If method, size and model do not fit.
    """
    say = progress or _say_nothing
    components, trusted = request.components, request.trust_remote_code
    target = build_networks(checkpoint, components, trust_remote_code=trusted)
    reports = inspect_checkpoint(
        checkpoint, request.asked, components=components, trust_remote_code=trusted
    )
    networks = find_networks(target, components)
    dtype = _dtype_of(checkpoint, networks, request)
    request = replace(request, dtype=str(dtype).removeprefix("torch."))
    for network in networks:
        set_dtype(network.module, dtype)
    with patch(
        target,
        request.what,
        sites=request.sites,
        components=components,
        **request.parameters,
    ) as handle:
        recipe, report = handle.recipe, handle.report
        changed = {network.name for network, _ in handle.networks}
    say("counting", 0, 1)
    traced = [
        trace_sizes(target, network, report, request)
        for network, report in zip(networks, reports, strict=True)
    ]
    at_size = [trace for sizes in traced for trace in sizes[0].traces]
    rates = measure_rates(at_size, request.device, progress=say)
    plans = [
        _plan(network, found, sizes, rates)
        for network, found, sizes in zip(networks, reports, traced, strict=True)
        if network.name in changed
    ]
    return Plan(
        networks=tuple(plans),
        recipe=recipe,
        report=report,
        steps=request.steps if any(n.family.denoises for n in networks) else 1,
        device=request.device,
        dtype=str(request.dtype),
        rates=rates,
    )


def _say_nothing(what: str, done: int, total: int) -> None:
    pass


def _dtype_of(
    checkpoint: Checkpoint, networks: Sequence[FoundNetwork], request: Request
) -> torch.dtype:
    """As asked, or what the weights are run in, or float32."""
    name = request.dtype
    if name is None:
        components = [network.component for network in networks]
        try:
            found = check_weights(checkpoint, components)
            name = dtype_to_run(checkpoint, request.device, None, components)
            name = name or next((weights.dtype for weights in found.values()), None)
        except CheckpointError:
            name = None
    dtype = getattr(torch, str(name or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"--dtype {name}: expected float32, bfloat16 or float16.")
    return dtype


def _plan(
    network: FoundNetwork, report: NetworkReport, sizes: Sequence[AtSize], rates: Rates
) -> NetworkPlan:
    here, *others = sizes
    return NetworkPlan(
        name=network.name,
        family=network.family.name,
        size=report.size,
        latent_scale=report.latent_scale,
        tokens=here.tokens,
        dense=cost_of([(here.dense, 1)], rates),
        patched=cost_of(here.patched, rates),
        exact=None if here.exact is None else cost_of([(here.exact, 1)], rates),
        kept=kept_by(here.patched),
        is_idle=here.is_idle,
        elsewhere={
            other.tokens: sum(seconds_of([(other.dense, 1)], rates).values())
            / sum(seconds_of(other.patched, rates).values())
            for other in others
        },
    )
