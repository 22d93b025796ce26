"""Compare a checkpoint with patches of it: find it, load it, make inputs, measure."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retrofit.checkpoints import Checkpoint, find_checkpoint
from retrofit.checkpoints.opening import build_networks, dtype_to_run, load_networks
from retrofit.evaluate import Progress, compare_models
from retrofit.evaluate.inputs import InputChoice, make_inputs, scene_inputs, scene_size
from retrofit.evaluate.peak_memory import with_peak_memory
from retrofit.evaluate.result import Comparison
from retrofit.patching.networks import FoundNetwork
from retrofit.patching.patch import patch
from retrofit.patching.recipe import Recipe
from retrofit.profiling.inspection import NetworkReport, inspect_checkpoint
from retrofit.reconstruct.fitting import running_dtype
from retrofit.runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A patch to compare with dense.

    Attributes:
        name: For tables.
        what: A method's name or a recipe.
        parameters: Settings that replace its own.
        sites: Globs instead of its own.
    """

    name: str
    what: Recipe | str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where and how a checkpoint's networks are opened.

    Attributes:
        device: Where they run.
        dtype: Of the weights; None keeps the checkpoint's own, but float32 for float16 on a CPU.
        components: Networks of a pipeline; empty takes those that denoise.
        config: For a single file: folder or hub id with its configs.
        trust_remote_code: Whether code that comes with the checkpoint may run.
    """

    device: str
    dtype: str | None = None
    config: str = ""
    components: tuple[str, ...] = ()
    trust_remote_code: bool = False


def compare_checkpoint(
    model: str | Path,
    variants: Sequence[Variant],
    choice: InputChoice,
    where: Where,
    *,
    rounds: int = 3,
    memory: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a checkpoint, dense, with patches of it.

    Args:
        model: A checkpoint. One that is patched is compared with its own patch, named `as saved`,
            besides the variants.
        variants: Patches; may be empty for a patched checkpoint.
        choice: Of the inputs.
        where: Device, dtype and components.
        rounds: How often every input is timed in every variant.
        memory: Whether to measure peak memory, in one process for each variant.
        progress: Called as `progress(what, done, total)`.

    Returns:
        Rows for dense and every variant.

    Raises:
        InputError: If a variant does not fit, before any weight is read.
    """
    checkpoint = find_checkpoint(model, config=where.config)
    recipes, networks = _resolve(checkpoint, _all_variants(checkpoint, variants), where)
    components = tuple(dict.fromkeys(network.component for network in networks))
    named = () if components == ("",) else components
    dtype = dtype_to_run(checkpoint, where.device, where.dtype, components)
    where = replace(where, dtype=dtype)
    scenes = scene_inputs(checkpoint, choice) if choice.files and _see_scenes(networks) else []
    if scenes:
        choice = replace(choice, asked=scene_size(scenes))
        where = replace(where, dtype=running_dtype(checkpoint, where.device, where.dtype))
    reports = inspect_checkpoint(
        checkpoint, choice.asked, components=named, trust_remote_code=where.trust_remote_code
    )
    choice = replace(choice, sizes={report.name: report.size for report in reports})
    open_target = functools.partial(_open, str(model), components, where)
    shared: dict[str, Any] = {"components": named, "progress": progress}
    if progress is not None:
        progress(f"loading {checkpoint.name}", 0, 1)
    target = open_target()
    inputs = scenes or make_inputs(target, choice, folder=checkpoint.configs, components=named)
    found = compare_models(target, recipes, inputs, rounds=rounds, seed=choice.seed, **shared)
    del target
    tokens = max(row.tokens for report in reports for row in report.sites)
    found = replace(found, attention_share=_attention_share(reports), tokens=tokens)
    return with_peak_memory(found, open_target, _largest(inputs), **shared) if memory else found


def _see_scenes(networks: Sequence[FoundNetwork]) -> bool:
    """Whether views of a scene are what the networks take."""
    examples = [network.family.inputs for network in networks]
    return any(example is not None and example.files == "scenes" for example in examples)


def _attention_share(reports: Sequence[NetworkReport]) -> float:
    """Of all networks together."""
    return sum(r.attention_flops for r in reports) / sum(r.flops for r in reports)


def _all_variants(checkpoint: Checkpoint, variants: Sequence[Variant]) -> list[Variant]:
    """Those asked for, after the one that the checkpoint was saved with."""
    found = [*_saved(checkpoint), *variants]
    if not found:
        raise InputError(
            f"{checkpoint.name}: not patched, so there is nothing to compare it with. "
            "Name a method with --method, or a recipe with --recipe."
        )
    return found


def _saved(checkpoint: Checkpoint) -> list[Variant]:
    """The patch that a patched checkpoint records."""
    if checkpoint.manifest is None:
        return []
    checkpoint.manifest.check_files(checkpoint.root)
    recipe = Recipe.from_dict(checkpoint.manifest.recipe, checkpoint.name)
    return [Variant(name=f"as saved: {recipe.methods}", what=recipe)]


def _resolve(
    checkpoint: Checkpoint, variants: Sequence[Variant], where: Where
) -> tuple[dict[str, Recipe], list[FoundNetwork]]:
    """Every variant's recipe, and the networks without weights that any of them changes."""
    recipes: dict[str, Recipe] = {}
    changed: list[FoundNetwork] = []
    for variant in variants:
        if variant.name in recipes:
            raise InputError(f"compare: {variant.name!r} is asked for twice. Leave one out.")
        named = where.components or getattr(variant.what, "components", ())
        networks = build_networks(checkpoint, named, trust_remote_code=where.trust_remote_code)
        handle = patch(
            networks, variant.what, sites=variant.sites, components=named, **variant.parameters
        )
        recipes[variant.name] = handle.recipe
        changed += [network for network, _ in handle.networks]
    return recipes, changed


def _open(model: str, components: tuple[str, ...], where: Where) -> Any:
    """The networks with their weights; in a child process too."""
    return load_networks(
        find_checkpoint(model, config=where.config),
        components,
        device=where.device,
        dtype=where.dtype,
        trust_remote_code=where.trust_remote_code,
    )


def _largest(inputs: Sequence[Any]) -> list[Any]:
    """One input of every network, the one with the most tokens."""
    by_network: dict[str, Any] = {}
    for item in inputs:
        held = by_network.get(item.network)
        if held is None or (item.tokens or 0) > (held.tokens or 0):
            by_network[item.network] = item
    return list(by_network.values())
