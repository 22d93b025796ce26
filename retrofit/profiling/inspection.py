"""Look at a checkpoint's attention without reading its weights.

The networks are built on the meta device and run there once on example inputs, which costs no
memory: every site tells its tokens, and the work is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.opening import build_networks
from retrofit.families.examples import Examples, InputSize
from retrofit.layout.picture_sizes import refuse_off_grid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods import METHODS
from retrofit.patching.networks import FoundNetwork, find_networks, module_of
from retrofit.patching.sites import UNREACHED
from retrofit.runtime.errors import InputError
from retrofit.runtime.intercept import ReplaceFunction, install, uninstall


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One attention call at the size asked for.

    Attributes:
        path: With its component.
        site: Its description.
        tokens: Queries.
        keys: Keys.
        flops: Of the attention alone: both products of one forward, batch 1.
    """

    path: str
    site: AttentionSite
    tokens: int
    keys: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """What one network is made of.

    Attributes:
        name: Its component, empty for a bare network.
        class_name: Of its module.
        family: Its family.
        size: Of the input that was counted, in the units of the network.
        latent_scale: Frames and pixels that one unit of it stands for.
        num_parameters: Weights.
        sites: In order of execution, those that can be reached.
        flops: Of one forward, attention included.
        attention_flops: Of all sites.
        unreachable: Attention that can't be patched, with the reason.
        methods: For each method, None where it applies, else why it does not.
    """

    name: str
    class_name: str
    family: str
    size: InputSize
    latent_scale: tuple[int, int]
    num_parameters: int
    sites: tuple[SiteRow, ...]
    flops: int
    attention_flops: int
    unreachable: dict[str, str]
    methods: dict[str, str | None]

    @property
    def attention_share(self) -> float:
        """Fraction of the work that is attention."""
        return self.attention_flops / self.flops if self.flops else 0.0


@dataclass(frozen=True, kw_only=True)
class AskedSize:
    """What a user asked for, in pixels, frames and tokens; None is the network's own size."""

    width: int | None = None
    height: int | None = None
    frames: int | None = None
    tokens: int | None = None


def inspect_checkpoint(
    checkpoint: Checkpoint,
    asked: AskedSize,
    *,
    components: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> list[NetworkReport]:
    """Describe every network of a known family.

    Args:
        checkpoint: Only its configs are read.
        asked: Size of the input to count.
        components: Networks of a pipeline; empty takes those that denoise.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        InputError: If the size does not fit the family, or there is no known network.
    """
    target = build_networks(checkpoint, components, trust_remote_code=trust_remote_code)
    return [
        _inspect(network, asked, _latent_scale(checkpoint, network))
        for network in find_networks(target, tuple(components))
    ]


def _inspect(
    network: FoundNetwork, asked: AskedSize, latent_scale: tuple[int, int] | None
) -> NetworkReport:
    description = network.family.describe(network.module).named(network.name)
    examples = network.family.inputs
    if examples is None:
        raise InputError(
            f"{network.where('')}: family {network.family.name} has no example inputs to count "
            "work with. Give another component."
        )
    scale = latent_scale or examples.latent_scale
    size = _network_size(network, examples, asked, scale)
    inputs = examples.shapes(network.module, size)
    reached = [site for site in description.sites if site.path not in description.unreachable]
    calls = {site.path: _Calls(is_causal=site.is_causal) for site in reached}
    total = _count(network, inputs, calls)
    rows = [_site_row(network, site, calls[site.path]) for site in reached]
    return NetworkReport(
        name=network.name,
        class_name=type(network.module).__name__,
        family=network.family.name,
        size=size,
        latent_scale=scale,
        num_parameters=sum(p.numel() for p in network.module.parameters()),
        sites=tuple(rows),
        flops=total,
        attention_flops=sum(row.flops for row in rows),
        unreachable=dict(description.unreachable),
        methods={name: _why_not(method(), description) for name, method in METHODS.items()},
    )


class _Calls:
    """The attention calls of one module."""

    def __init__(self, *, is_causal: bool) -> None:
        self.is_causal = is_causal
        self.tokens = 0
        self.keys = 0
        self.flops = 0

    def __call__(
        self, call_index: int, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
    ) -> Tensor:
        """Note the sizes; on the meta device only the result's shape matters."""
        self.tokens = query.shape[-2]
        self.keys = key.shape[-2]
        self.flops += attention_flops(query, key, value, is_causal=self.is_causal)
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> int:
    """Both products of one attention call: two operations for each multiplication.

    Of a causal call the pairs that are seen are counted, about half of all.
    """
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    seen = num_queries * num_keys
    if is_causal:
        seen = num_queries * (2 * num_keys - num_queries + 1) // 2
    pairs = math.prod(query.shape[:-2]) * seen
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _count(network: FoundNetwork, inputs: dict[str, Any], calls: dict[str, _Calls]) -> int:
    """Run on the meta device; returns the work of the whole forward."""
    modules = {path: module_of(network, path) for path in calls}
    counter = FlopCounterMode(display=False)
    try:
        for path, module in modules.items():
            where = network.where(path)
            handler = ReplaceFunction(
                scaled_dot_product_attention, calls[path], where=where, why_unreached=UNREACHED
            )
            install(module, handler, owner="retrofit's inspection", where=where)
        with torch.no_grad(), torch.device("meta"), counter:
            network.module(**{name: _to_meta(value) for name, value in inputs.items()})
    finally:
        for module in modules.values():
            uninstall(module)
    return int(counter.get_total_flops()) + sum(record.flops for record in calls.values())


def _to_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_meta(item) for name, item in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def _site_row(network: FoundNetwork, site: AttentionSite, calls: _Calls) -> SiteRow:
    return SiteRow(
        path=network.where(site.path),
        site=site,
        tokens=calls.tokens,
        keys=calls.keys,
        flops=calls.flops,
    )


def _why_not(method: Any, description: Network) -> str | None:
    refusal = method.explain_refusal(description)
    if refusal is not None:
        return str(refusal)
    reasons = [method.skips(site, description) for site in description.sites]
    if all(reasons) and not method.handlers(description, _no_state()):
        return "; ".join(sorted(set(map(str, reasons)))) or "it has no attention"
    return None


def _no_state() -> Any:
    from retrofit.methods.run_state import RunState

    return RunState()


def network_size(checkpoint: Checkpoint, network: FoundNetwork, asked: AskedSize) -> InputSize:
    """A user's pixels, frames and tokens in the units of a network.

    Raises:
        InputError: If the size does not fit the family.
    """
    examples = network.family.inputs
    if examples is None:
        raise InputError(
            f"{network.where('')}: family {network.family.name} has no example inputs. Give "
            "another component."
        )
    scale = _latent_scale(checkpoint, network) or examples.latent_scale
    return _network_size(network, examples, asked, scale)


def _network_size(
    network: FoundNetwork, examples: Examples, asked: AskedSize, scale: tuple[int, int]
) -> InputSize:
    """A user's pixels, frames and tokens in the units of the network."""
    where = network.where("")
    given = {
        "tokens": asked.tokens is not None,
        "size": asked.width is not None,
        "frames": asked.frames is not None,
    }
    for axis, is_given in given.items():
        if is_given and axis not in examples.axes:
            options = " and ".join(f"--{name}" for name in examples.axes)
            raise InputError(
                f"{where}: --{axis} says nothing to family {network.family.name}. Use {options}."
            )
    native = examples.native(network.module)
    per_frame, pixels = scale
    if asked.tokens is not None:
        return InputSize(tokens=asked.tokens)
    frames = native.frames if asked.frames is None else -(-(asked.frames - 1) // per_frame) + 1
    if asked.width is None or asked.height is None:
        return InputSize(
            height=native.height, width=native.width, frames=frames, tokens=native.tokens
        )
    if pixels > 1 and "frames" not in examples.axes:  # video pipelines round sizes themselves
        refuse_off_grid(asked.width, asked.height, pixels * examples.packed)
    size = InputSize(
        height=-(-asked.height // pixels), width=-(-asked.width // pixels), frames=frames
    )
    least = examples.least(network.module)
    if size.height < least.height or size.width < least.width:
        raise InputError(
            f"--size {asked.width}x{asked.height}: expected {least.width * pixels}x"
            f"{least.height * pixels} pixels or more, which are one token of {where}, got fewer. "
            "Take a larger one."
        )
    return size


def _latent_scale(checkpoint: Checkpoint, network: FoundNetwork) -> tuple[int, int] | None:
    """What the autoencoder beside a network says."""
    if "vae" not in checkpoint.classes or not network.family.denoises:
        return None
    config = checkpoint.config("vae")
    if "scale_factor_spatial" in config:
        return int(config.get("scale_factor_temporal", 1)), int(config["scale_factor_spatial"])
    channels = config.get("block_out_channels")
    return (1, 2 ** (len(channels) - 1)) if channels else None
