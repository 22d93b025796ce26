"""The proof of a patch: a seeded probe that anyone can repeat in a fresh process.

One step of each patched network on example inputs, dense and patched. A proof is made only where
at least one site really dropped work and the output changed, or ran an exact method.
`retrofit.artifact.verifying` repeats it in a process of its own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from retrofit.families.examples import Examples, InputSize
from retrofit.patching.networks import FoundNetwork, find_networks
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe
from retrofit.patching.sites import AttendAtSite
from retrofit.runtime.devices import main_parameter
from retrofit.runtime.errors import CheckpointError, NonFiniteError, UnsupportedError
from retrofit.runtime.finite import find_nonfinite, is_finite

log = logging.getLogger(__name__)

STEPS = 50
SAMPLES = 256
ROUNDING = 1e4  # of the largest value, before hashing
UNCHANGED = 1e-6  # relative difference that rounding alone can make
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
SPREAD = 0.25  # how far the distance from dense may be off, relative


def make_proof(target: Any, recipe: Recipe, *, seed: int, device: str) -> dict[str, Any]:
    """Run the probe and record what came out.

    Args:
        target: An unpatched model, or the patched networks of a pipeline, with weights.
        recipe: What to prove.
        seed: Of the inputs.
        device: Where the target is.

    Returns:
        Plain data for `retrofit.json`.

    Raises:
        UnsupportedError: If nothing changes at any probe size, or a family has no example inputs.
        NonFiniteError: If the dense model gives NaN.
    """
    networks = []
    for network in find_networks(target, recipe.components):
        found = _probe(target, recipe, network, seed)
        if found is not None:
            networks.append(found)
    return {"seed": seed, "device": device, "steps": STEPS, "networks": networks}


def repeat_proof(target: Any, recipe: Recipe, proof: Mapping[str, Any]) -> dict[str, Any]:
    """Run the probe of a recorded proof again, at a size that its family has; returns the same."""
    sizes = {entry["name"]: InputSize(**entry["size"]) for entry in proof["networks"]}
    for network in find_networks(target, recipe.components):
        size = sizes.get(network.name)
        if size is not None and ("tokens" in _examples(network).axes) != (size.tokens > 0):
            where, family = network.where(""), network.family.name
            problem = f"{where}: its proof is of {size}, which is no size of family {family}."
            raise CheckpointError(
                f"{problem} Run `retrofit patch` on the source again, into another folder."
            )
    networks = [
        _run_both(target, recipe, network, sizes[network.name], proof["seed"])
        for network in find_networks(target, recipe.components)
        if network.name in sizes
    ]
    return {**proof, "networks": networks}


def compare_proofs(recorded: Mapping[str, Any], repeated: Mapping[str, Any]) -> list[str]:
    """What differs between two proofs by more than another machine explains; empty when nothing."""
    names = [entry["name"] for entry in recorded["networks"]]
    again = {entry["name"]: entry for entry in repeated["networks"]}
    missing = [name for name in names if name not in again]
    if missing:
        return [f"network {missing[0]!r} is not there"]
    return [
        problem
        for entry in recorded["networks"]
        for problem in _compare_networks(entry, again[entry["name"]])
    ]


def is_identical(recorded: Mapping[str, Any], repeated: Mapping[str, Any]) -> bool:
    """Whether two proofs agree in every rounded bit."""
    hashes = [
        [entry[kind]["sha256"] for entry in proof["networks"] for kind in ("dense", "patched")]
        for proof in (recorded, repeated)
    ]
    return hashes[0] == hashes[1]


def _probe(target: Any, recipe: Recipe, network: FoundNetwork, seed: int) -> dict[str, Any] | None:
    """The first probe size at which the patch acts; None for a network that is not patched."""
    sizes = _examples(network).probes(network.module)
    for size in sizes:
        log.info("proof: %s at %s", network.where(""), size)
        found = _run_patched(target, recipe, network, size, seed)
        if found is None:
            return None
        kept, _, acts = found
        if not kept or _sparse(kept) or (recipe.is_exact and acts):
            result = _run_both(target, recipe, network, size, seed)
            if result["relative_difference"] > UNCHANGED or recipe.is_exact:
                return result
    unit = " latents" if network.family.denoises else ""
    raise UnsupportedError(
        f"{network.where('')}: "
        + recipe.explain_no_change(f"up to {sizes[-1]}{unit}, the largest size of a proof")
        + " A patch that is for larger inputs only is written with --no-proof."
    )


def _run_both(
    target: Any, recipe: Recipe, network: FoundNetwork, size: InputSize, seed: int
) -> dict[str, Any]:
    inputs = _make_inputs(network, size, seed)
    dense = _run(network, inputs)
    if not is_finite(dense):
        culprit = network.where(find_nonfinite(network.module, lambda: _run(network, inputs)) or "")
        raise NonFiniteError(
            f"{culprit}: the dense model itself gives NaN in {_dtype(network)}. "
            "Use --dtype float32 or bfloat16."
        )
    found = _run_patched(target, recipe, network, size, seed)
    if found is None:
        raise UnsupportedError(f"{network.where('')}: the recipe patches nothing in it.")
    kept, patched, _ = found
    keeps = [keep for site in kept.values() for keep in site]
    return {
        "name": network.name,
        "family": network.family.name,
        "dtype": _dtype(network),
        "size": asdict(size),
        "inputs": _hash_inputs(_draw_inputs(network, size, seed)),
        "sites": len(kept),
        "sparse_sites": len(_sparse(kept)),
        "keep_measured": sum(keeps) / len(keeps) if keeps else None,
        "relative_difference": float((patched - dense).norm() / dense.norm()),
        "dense": _digest(dense),
        "patched": _digest(patched),
    }


def _run_patched(
    target: Any, recipe: Recipe, network: FoundNetwork, size: InputSize, seed: int
) -> tuple[dict[str, list[float]], Tensor, bool] | None:
    """What the calls of a network's sites kept, its output, and whether any was ours."""
    inputs = _make_inputs(network, size, seed)
    with patch(target, recipe) as handle:
        if all(patched.module is not network.module for patched, _ in handle.networks):
            return None
        with torch.random.fork_rng(devices=[]), handle.measuring() as kept:
            torch.manual_seed(seed)
            if network.family.denoises:
                handle.at_step(recipe.acting_step(STEPS), STEPS)
            out = _run(network, inputs)
        own = {site.where: kept.kept[site.where] for site in _own_sites(handle, network)}
        return own, out, not handle.changes_nothing()


def _own_sites(handle: Patch, network: FoundNetwork) -> list[AttendAtSite]:
    """Sites that compute a picture's or text's own attention, or all where there are none."""
    sites = [s for s in handle.sites.values() if s.site.network == network.name]
    return [site for site in sites if site.site.kind != "cross"] or sites


def _sparse(kept: Mapping[str, Sequence[float]]) -> list[str]:
    return [where for where, keeps in kept.items() if any(keep < 1 for keep in keeps)]


@torch.no_grad()
def _run(network: FoundNetwork, inputs: dict[str, Any]) -> Tensor:
    """Everything that a network puts out, as one float32 row on the CPU."""
    out = network.module(**inputs)
    return torch.cat([x.detach().float().flatten().cpu() for x in _tensors(out)])


def _make_inputs(network: FoundNetwork, size: InputSize, seed: int) -> dict[str, Any]:
    """Seeded inputs where the network is, in its dtype."""
    like = main_parameter(network.module)
    drawn = _draw_inputs(network, size, seed)
    return {name: _cast(value, like) for name, value in drawn.items()}


def _draw_inputs(network: FoundNetwork, size: InputSize, seed: int) -> dict[str, Any]:
    """The same on the CPU in float32."""
    generator = torch.Generator().manual_seed(seed)
    return _examples(network).make(network.module, size, generator)


def _examples(network: FoundNetwork) -> Examples:
    if network.family.inputs is None:
        raise UnsupportedError(
            f"{network.where('')}: family {network.family.name} has no example inputs to prove a "
            "patch with. Use --no-proof."
        )
    return network.family.inputs


def _cast(value: Any, like: Tensor) -> Any:
    if isinstance(value, dict):
        return {name: _cast(item, like) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    dtype = like.dtype if value.is_floating_point() else value.dtype
    return value.to(like.device, dtype)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in an output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _dtype(network: FoundNetwork) -> str:
    return str(main_parameter(network.module).dtype).removeprefix("torch.")


def _digest(values: Tensor) -> dict[str, Any]:
    """A hash for the machine that made it, statistics and samples for any other."""
    largest = float(values.abs().max())
    rounded = (values.double() / (largest or 1.0) * ROUNDING).round().to(torch.int64)
    places = torch.linspace(0, values.numel() - 1, min(SAMPLES, values.numel())).long()
    return {
        "sha256": hashlib.sha256(rounded.numpy().tobytes()).hexdigest(),
        "numel": values.numel(),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "largest": largest,
        "samples": [float(f"{x:.7g}") for x in values[places].tolist()],
    }


def _hash_inputs(inputs: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for tensor in _all_tensors(inputs):
        digest.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _all_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from _all_tensors(value[name])


def _compare_networks(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    name = recorded["name"] or recorded["family"]
    if recorded["inputs"] != again["inputs"]:
        return [f"{name}: the probe's inputs could not be drawn again with this PyTorch"]
    tolerance = max(TOLERANCE.get(entry["dtype"], 1e-3) for entry in (recorded, again))
    problems = []
    for kind in ("dense", "patched"):
        if recorded[kind]["sha256"] == again[kind]["sha256"]:
            continue
        distance = _distance(recorded[kind], again[kind])
        if not distance <= tolerance:
            problems.append(
                f"{name}: the {kind} output is {distance:.1e} away from the recorded one "
                f"(tolerance {tolerance:.0e})"
            )
    before, after = recorded["relative_difference"], again["relative_difference"]
    if not abs(before - after) <= SPREAD * before + tolerance * 1e-2:
        problems.append(
            f"{name}: patched differs from dense by {after:.2e}, recorded was {before:.2e}"
        )
    return problems


def _distance(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> float:
    """Relative distance of two digests by their samples and statistics."""
    lengths = [(found["numel"], len(found["samples"])) for found in (recorded, again)]
    if lengths[0] != lengths[1]:
        return float("inf")
    first = torch.tensor(recorded["samples"], dtype=torch.float64)
    second = torch.tensor(again["samples"], dtype=torch.float64)
    scale = max(recorded["std"], 1e-30)
    statistics = [abs(recorded[key] - again[key]) / scale for key in ("mean", "std")]
    return max(float((first - second).norm() / first.norm().clamp_min(1e-30)), *statistics)
