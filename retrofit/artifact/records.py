"""What `retrofit.json` records of a patch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from retrofit.checkpoints.fingerprint import LEARNED, FileRecord
from retrofit.checkpoints.manifest import RESTORE, Manifest
from retrofit.patching.patch import Patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import CheckpointError


def describe_patch(patch: Patch) -> dict[str, Any]:
    """What a manifest records of a patch."""
    return {
        "family": patch.report.families,
        "recipe": patch.recipe.to_dict(),
        "sites": site_map(patch),
        "changed": list(patch.report.changed),
        "skipped": [[skip.path, skip.reason] for skip in patch.report.skipped],
    }


def write_learned(recipe: Recipe, folder: Path) -> dict[str, FileRecord]:
    """Write the learned parts of a recipe, if any; returns the record of their file."""
    if not recipe.learned:
        return {}
    from safetensors.torch import save_file

    state = {name: x.detach().cpu().contiguous().clone() for name, x in recipe.learned.items()}
    save_file(state, folder / LEARNED)
    return {LEARNED: FileRecord.of(folder / LEARNED)}


def read_learned(manifest: Manifest, recipe: Recipe, folder: Path) -> Recipe:
    """A recipe with the learned parts that lie beside its record.

    Raises:
        CheckpointError: If their file can't be read.
    """
    if not manifest.has_learned:
        return recipe
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return replace(recipe, learned=load_file(folder / LEARNED))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / LEARNED}: can't be read ({error}). {RESTORE}") from error


def site_map(patch: Patch) -> list[dict[str, Any]]:
    """Every patched site: its network, path, index, block and kind."""
    return [
        {
            "network": handler.site.network,
            "path": handler.site.path,
            "index": handler.site.index,
            "block": handler.site.block,
            "kind": handler.site.kind,
        }
        for handler in patch.sites.values()
    ]
