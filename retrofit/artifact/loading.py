"""Load a patched checkpoint, and find the handle of a patch that nobody holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrofit.artifact.adapter import add_adapter
from retrofit.artifact.records import read_learned, site_map
from retrofit.artifact.verifying import require_patched
from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.manifest import MANIFEST, Manifest
from retrofit.checkpoints.opening import load_whole
from retrofit.patching.guard import GuardRoot
from retrofit.patching.networks import find_networks, is_pipeline
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import CheckpointError, InputError
from retrofit.runtime.intercept import find_interceptor


def load(
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a patched checkpoint: the model or pipeline of its library, with the patch in it.

    Sizes and samples of every file are compared with the record, which takes milliseconds, and
    every byte of files that are newer than it: edited since patching, or downloaded.
    `retrofit verify` compares every byte of all.

    Args:
        folder: What `retrofit patch` or `save` wrote, or its hub id.
        device: Where it goes; None leaves it on the CPU, as the libraries do.
        dtype: Of the weights (`float16`); None keeps the checkpoint's own.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Returns:
        A model in evaluation mode, or a pipeline. `patch_of` gives the handle of its patch.

    Raises:
        CheckpointError: If it is not a patched checkpoint, or can't be opened.
        VerificationError: If its files or its record were changed.

    Example:
        ```py
        pipe = retrofit.load("sdxl-hidiffusion/", device="cuda")
        image = pipe("a lighthouse at dusk", height=2048, width=2048).images[0]
        retrofit.patch_of(pipe).remove()  # dense from here on
        ```
    """
    checkpoint = find_checkpoint(folder)
    manifest = require_patched(checkpoint)
    manifest.check_files(checkpoint.root)
    recipe = Recipe.from_dict(manifest.recipe, str(checkpoint.root / MANIFEST))
    recipe = read_learned(manifest, recipe, checkpoint.root)
    target = load_whole(
        checkpoint,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    add_adapter(target, recipe.components, checkpoint.root)
    handle = patch(target, recipe)
    _compare_sites(handle, manifest, checkpoint.name)
    return target


def patch_of(target: Any) -> Patch:
    """The handle of the patch in a model or pipeline, also after `load`, `deepcopy` or `pickle`.

    Args:
        target: A patched model or pipeline.

    Returns:
        A handle whose `remove()`, `at_step()` and `measuring()` act on that patch.

    Raises:
        InputError: If it is not patched.
    """
    parts = target.components.values() if is_pipeline(target) else [target]
    handle: Patch | None = None
    for part in parts:
        for module in part.modules() if hasattr(part, "modules") else ():
            interceptor = find_interceptor(module)
            if interceptor is None:
                continue
            for handler in interceptor.handlers:
                if isinstance(handler, GuardRoot) and handler.installed is not None:
                    handle = handle or _new_handle(handler)
                    handle.roots.append(handler)
                    handle.sites |= {site.where: site for site in handler.sites}
    if handle is None:
        raise InputError(f"{type(target).__name__}: not patched. Patch it with `retrofit.patch`.")
    _adopt_modules(handle, target)
    return handle


def _new_handle(root: GuardRoot) -> Patch:
    recipe, report = root.installed  # type: ignore[misc]
    handle = Patch(recipe)
    handle.report, handle.state, handle.control = report, root.state, root.control
    return handle


def _adopt_modules(handle: Patch, target: Any) -> None:
    """Everything that `remove` has to undo."""
    for network in find_networks(target, handle.recipe.components):
        for module in network.module.modules():
            if find_interceptor(module) is not None:
                handle.modules.append(module)
            if "cache_context" in module.__dict__:
                handle.contexts.append(module)
        handle.networks.append(
            (network, network.family.describe(network.module).named(network.name))
        )


def _compare_sites(handle: Patch, manifest: Manifest, name: str) -> None:
    """Refuse a model that these library versions lay out otherwise than at patch time."""
    keys = ("network", "kind", "index", "block")
    recorded = sorted(tuple(site[key] for key in keys) for site in manifest.sites)
    found = sorted(tuple(site[key] for key in keys) for site in site_map(handle))
    if recorded != found:
        handle.remove()
        written = ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
        raise CheckpointError(
            f"{name}: expected the {len(recorded)} sites recorded in {MANIFEST}, got {len(found)} "
            f"others: the libraries lay this model out differently now. It was written with "
            f"{written}."
        )
