"""What to expect of a request, and which methods help, where users may hope for something else."""

from __future__ import annotations

from typing import Any

from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.opening import build_networks
from retrofit.methods import METHODS
from retrofit.patching.networks import find_networks
from retrofit.patching.recipe import Recipe, shipped_recipes
from retrofit.runtime.errors import UnsupportedError
from retrofit.sampling.request import Request
from retrofit.sampling.sizes import native_size

ENLARGED = 1.5  # times the area trained at, from which on a picture is likely to repeat itself


def explain_size(request: Request, checkpoint: Checkpoint) -> str | None:
    """What to expect of a size and of few steps, where that is not what the user hopes for."""
    native = native_size(checkpoint)
    if native is None or request.width is None or request.height is None:
        return None
    area = request.width * request.height / (native[0] * native[1])
    if request.recipe is not None:
        method = Recipe.from_dict(request.recipe).method
        return method.explain_run(f"{native[0]}x{native[1]}", area, request.steps)
    if area <= ENLARGED or request.image is not None:
        return None
    trusted = request.trust_remote_code
    methods = enlarging_methods(build_networks(checkpoint, trust_remote_code=trusted))
    if not methods:
        return None
    return (
        f"trained at {native[0]}x{native[1]}: above it objects repeat. "
        f"Add --method {' or '.join(methods)}."
    )


def enlarging_methods(target: Any) -> list[str]:
    """Methods for sizes above the training size that have a recipe for a pipeline's networks."""
    try:
        families = {network.family.name for network in find_networks(target)}
    except UnsupportedError:
        return []
    shipped = shipped_recipes()
    return [
        name
        for name, method in METHODS.items()
        if method.enlarges and any(f"{family}_{name}" in shipped for family in families)
    ]
