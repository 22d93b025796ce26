"""A patch of a checkpoint, worked out on its configs alone, and its proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.artifact.copying import FileState, total_size
from retrofit.checkpoints.layouts import CONFIG_FOLDER, Checkpoint
from retrofit.checkpoints.manifest import MANIFEST
from retrofit.checkpoints.opening import build_networks, load_networks
from retrofit.checkpoints.places import list_files
from retrofit.checkpoints.weights import PICKLES
from retrofit.methods import Method
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe, method_names
from retrofit.runtime.errors import AlreadyPatchedError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A patch worked out on configs alone.

    Attributes:
        checkpoint: The source.
        handle: The patch, installed in networks without weights.
        files: The source's own files.
        configs: Configs to put beside a single-file checkpoint.
        states: What files and configs were before anything was read from them.
    """

    checkpoint: Checkpoint
    handle: Patch
    files: dict[str, Path]
    configs: dict[str, Path]
    states: dict[str, FileState]

    @property
    def recipe(self) -> Recipe:
        """The recipe with every setting filled in."""
        return self.handle.recipe

    @property
    def components(self) -> list[str]:
        """Components whose networks the recipe names or patches."""
        if self.checkpoint.pipeline_class is None:
            return [""]
        patched = [network.component for network, _ in self.handle.networks]
        return list(dict.fromkeys([*patched, *self.recipe.components]))

    @property
    def has_weights(self) -> bool:
        """Whether any weights lie there, pickles included; a dry run works on configs alone."""
        return any(Path(path).suffix in (".safetensors", *PICKLES) for path in self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes that a copy takes."""
        return total_size(self.files) + total_size(self.configs)


def plan_patch(
    checkpoint: Checkpoint,
    what: Recipe | Method | str,
    *,
    sites: Sequence[str] = (),
    components: Sequence[str] = (),
    trust_remote_code: bool = False,
    **parameters: Any,
) -> Plan:
    """Work out a patch without reading weights; arguments as for `patch`.

    Raises:
        AlreadyPatchedError: If the checkpoint is patched.
        InputError: If the recipe does not fit it.
    """
    if checkpoint.manifest is not None:
        method = method_names(checkpoint.manifest.recipe)
        raise AlreadyPatchedError(
            f"{checkpoint.name}: already patched with {method}. Undo that first: "
            f"retrofit unpatch {checkpoint.name} -o NEW_FOLDER"
        )
    files, configs = _find_files(checkpoint)
    states = {path: FileState.of(file) for path, file in (files | configs).items()}
    named = tuple(components) or (what.components if isinstance(what, Recipe) else ())
    networks = build_networks(checkpoint, named, trust_remote_code=trust_remote_code)
    handle = patch(networks, what, sites=sites, components=named, **parameters)
    return Plan(checkpoint=checkpoint, handle=handle, files=files, configs=configs, states=states)


def _find_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], dict[str, Path]]:
    """The source's own files, and configs to put beside a single one."""
    if checkpoint.file is None:
        files = list_files(checkpoint.root)
        files.pop(MANIFEST, None)  # of a patch that `save` writes anew
        return files, {}
    configs = {
        f"{CONFIG_FOLDER}/{path}": file
        for path, file in list_files(checkpoint.configs).items()
        if file.suffix in (".json", ".txt", ".model")
    }
    return {checkpoint.file.name: checkpoint.file}, configs


def prove(
    plan: Plan,
    *,
    seed: int = 0,
    device: str,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load the patched networks and run the probe of `retrofit.artifact.proof`.

    Raises:
        UnsupportedError: If the patch changes nothing.
    """
    from retrofit.artifact.proof import make_proof

    target = load_networks(
        plan.checkpoint,
        plan.components,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return make_proof(target, plan.recipe, seed=seed, device=device)
