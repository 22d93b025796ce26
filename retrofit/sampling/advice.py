"""What to expect of a request, and which methods help, where users may hope for something else."""

from __future__ import annotations

import re
from typing import Any

from retrofit.checkpoints import Checkpoint, read_json
from retrofit.checkpoints.opening import build_networks
from retrofit.methods import METHODS
from retrofit.patching.networks import find_networks
from retrofit.patching.recipe import Recipe, shipped_recipes
from retrofit.runtime.errors import UnsupportedError
from retrofit.sampling.request import Request
from retrofit.sampling.sizes import DEFAULTS, native_size

FAR, FEW_STEPS = 3.0, 4  # times the sides trained at, and steps that don't do for them
ENLARGED = 1.5  # times the area trained at, from which on a picture is likely to repeat itself


def explain_prompts(request: Request, checkpoint: Checkpoint) -> str | None:
    """Which prompts name nothing that a checkpoint knows, where its own list says what it does."""
    file = checkpoint.configs / DEFAULTS
    subjects = read_json(file).get("subjects") if file.is_file() else None
    if not isinstance(subjects, list):
        return None
    words = {str(subject) for subject in subjects}
    strange = [p for p in request.prompts if not words & set(re.findall(r"[a-z]+", p.lower()))]
    if not strange:
        return None
    return (
        f"{checkpoint.name} draws only {', '.join(sorted(words))}, and {strange[0]!r} names none "
        "of them: the picture will show something else."
    )


def explain_steps(request: Request, checkpoint: Checkpoint) -> str | None:
    """What to expect of a picture far above the training size in very few steps."""
    native = native_size(checkpoint)
    if native is None or request.steps is None or request.width is None or request.height is None:
        return None
    times = (request.width * request.height / (native[0] * native[1])) ** 0.5
    if times < FAR or request.steps > FEW_STEPS or request.image is not None:
        return None
    return (
        f"{request.steps} steps at {times:.0f} times the training size of {native[0]}x{native[1]} "
        "mostly give noise. Raise --steps, or take a smaller --size."
    )


def explain_size(request: Request, checkpoint: Checkpoint) -> str | None:
    """What to expect of a size and of few steps, where that is not what the user hopes for."""
    native = native_size(checkpoint)
    if native is None or request.width is None or request.height is None:
        return None
    area = request.width * request.height / (native[0] * native[1])
    if request.recipe is not None:
        methods = [rule.method for rule in Recipe.from_dict(request.recipe).rules]
        said = [m.explain_run(f"{native[0]}x{native[1]}", area, request.steps) for m in methods]
        return " ".join(filter(None, said)) or None
    if area <= ENLARGED or request.image is not None:
        return None
    trusted = request.trust_remote_code
    names = enlarging_methods(build_networks(checkpoint, trust_remote_code=trusted))
    if not names:
        return None
    return (
        f"trained at {native[0]}x{native[1]}: above it objects repeat. "
        f"Add --method {' or '.join(names)}."
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
