"""Write a patched checkpoint from its source, from a patched model, or the source from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrofit.checkpoint import CONFIG_FOLDER, Checkpoint, find_checkpoint
from retrofit.checkpoint.fingerprint import FileRecord
from retrofit.checkpoint.manifest import (
    MANIFEST,
    RESTORE,
    Manifest,
    current_versions,
    describe_patch,
)
from retrofit.checkpoint.opening import build_networks, check_weights, load_networks
from retrofit.checkpoint.verifying import require_patched
from retrofit.checkpoint.weights import PICKLES
from retrofit.checkpoint.writing import (
    Advance,
    copy_files,
    list_files,
    new_folder,
    refuse_full_disk,
    refuse_output,
    total_size,
)
from retrofit.errors import AlreadyPatchedError, CheckpointError, VerificationError
from retrofit.methods import Method
from retrofit.patching import Patch, patch
from retrofit.recipe import Recipe

log = logging.getLogger(__name__)


def ignore_progress(amount: int) -> None:
    """The default for everything that reports bytes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A patch worked out on configs alone.

    Attributes:
        checkpoint: The source.
        handle: The patch, installed in networks without weights.
        files: The source's own files.
        configs: Configs to put beside a single-file checkpoint.
    """

    checkpoint: Checkpoint
    handle: Patch
    files: dict[str, Path]
    configs: dict[str, Path]

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
        method = checkpoint.manifest.recipe.get("method")
        raise AlreadyPatchedError(
            f"{checkpoint.name}: already patched with {method}. Undo that first: "
            f"retrofit unpatch {checkpoint.name} -o NEW_FOLDER"
        )
    named = tuple(components) or (what.components if isinstance(what, Recipe) else ())
    networks = build_networks(checkpoint, named, trust_remote_code=trust_remote_code)
    handle = patch(networks, what, sites=sites, components=named, **parameters)
    if checkpoint.file is None:
        files = list_files(checkpoint.root)
        files.pop(MANIFEST, None)  # of a patch that `save` writes anew
        return Plan(checkpoint=checkpoint, handle=handle, files=files, configs={})
    configs = {
        f"{CONFIG_FOLDER}/{path}": file
        for path, file in list_files(checkpoint.configs).items()
        if file.suffix in (".json", ".txt", ".model")
    }
    files = {checkpoint.file.name: checkpoint.file}
    return Plan(checkpoint=checkpoint, handle=handle, files=files, configs=configs)


def prove(
    plan: Plan,
    *,
    seed: int = 0,
    device: str,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load the patched networks and run the probe of `retrofit.checkpoint.proof`.

    Raises:
        UnsupportedError: If the patch changes nothing.
    """
    from retrofit.checkpoint.proof import make_proof

    target = load_networks(
        plan.checkpoint,
        plan.components,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return make_proof(target, plan.recipe, seed=seed, device=device)


def write_patched(
    plan: Plan,
    out: str | Path,
    *,
    proof: dict[str, Any] | None,
    link: bool = False,
    force: bool = False,
    advance: Advance = ignore_progress,
) -> Manifest:
    """Write the source's own files and `retrofit.json`, whole or not at all.

    Args:
        plan: What to write.
        out: The new folder.
        proof: What `prove` returned, or None.
        link: Hard-link instead of copying.
        force: Replace an earlier result.
        advance: Told of every number of bytes written.

    Raises:
        InputError: If `out` can't be written.
        RetrofitError: If the disk is too full.
    """
    out = Path(out).expanduser()
    refuse_target(plan, out, force=force)
    check_weights(plan.checkpoint)
    if not link:
        refuse_full_disk(out, plan.num_bytes)
    with new_folder(out, replace=force) as folder:
        manifest = Manifest(
            source=_public_name(plan.checkpoint),
            **describe_patch(plan.handle),
            files=copy_files(plan.files, folder, link=link, advance=advance),
            configs=copy_files(plan.configs, folder, link=False, advance=advance),
            single_file=plan.checkpoint.file.name if plan.checkpoint.file else "",
            versions=current_versions(),
            proof=proof,
        )
        manifest.write(folder)
        refuse_target(plan, out, force=force)  # what is there now, not what was
    return manifest


def refuse_target(plan: Plan, out: Path, *, force: bool) -> None:
    """Check, before anything is computed, that the output may be written."""
    names = {*plan.files, *plan.configs}
    source = plan.checkpoint.file or plan.checkpoint.root
    refuse_output(out, source, force=force, names=names, check_earlier=_check_patched)


def save(
    target: Any, out: str | Path, *, link: bool = False, force: bool = False, proof: bool = True
) -> Path:
    """Save a patched model or pipeline: the files it was loaded from, and `retrofit.json`.

    Nothing is written that the model does not hold: weights that changed since they were loaded
    are refused.

    Args:
        target: A patched model or pipeline that `from_pretrained` loaded.
        out: The new folder.
        link: Hard-link the files instead of copying them.
        force: Replace an earlier result.
        proof: Whether to record a proof for `retrofit verify`.

    Returns:
        The folder.

    Raises:
        InputError: If it is not patched, its weights are not those of its files, or `out` exists.

    Example:
        ```py
        pipe = DiffusionPipeline.from_pretrained("sdxl/")
        retrofit.patch(pipe, "hidiffusion")
        retrofit.save(pipe, "sdxl-hidiffusion/")
        ```
    """
    from retrofit.checkpoint.loading import patch_of, pick_device
    from retrofit.checkpoint.origin import check_unchanged, find_origin

    recipe = patch_of(target).recipe
    checkpoint = find_origin(target)
    plan = plan_patch(checkpoint, recipe)
    out = Path(out).expanduser()
    refuse_target(plan, out, force=force)
    check_unchanged(target, checkpoint)
    record = prove(plan, device=pick_device(None)) if proof else None
    write_patched(plan, out, proof=record, link=link, force=force)
    return out


def unpatch(
    folder: str | Path,
    out: str | Path,
    *,
    link: bool = False,
    force: bool = False,
    advance: Callable[[int], object] = ignore_progress,
) -> Path:
    """Write the checkpoint that a patched one was made from, byte for byte.

    Args:
        folder: A patched checkpoint.
        out: The new folder.
        link: Hard-link instead of copying.
        force: Replace an earlier result.
        advance: Told of every number of bytes written.

    Returns:
        The new folder.

    Raises:
        InputError: If it is not patched, or `out` exists.
        VerificationError: If a file is not what was recorded; nothing is written then.
    """
    checkpoint = find_checkpoint(folder)
    manifest = require_patched(checkpoint)
    out = Path(out).expanduser()
    files = {path: checkpoint.root / path for path in manifest.files}
    source_only = replace(manifest, configs={})

    def refuse() -> None:
        root, names = checkpoint.root, set(files)
        refuse_output(out, root, force=force, names=names, check_earlier=source_only.check_files)

    refuse()
    manifest.check_files(checkpoint.root)
    if not link:
        refuse_full_disk(out, total_size(files))
    with new_folder(out, replace=force) as hidden:
        written = copy_files(files, hidden, link=link, advance=advance)
        for path, record in written.items():
            _compare(folder, path, record, manifest.files[path])
        refuse()  # what is there now, not what was
    return out


def _check_patched(folder: Path) -> None:
    """Raise unless a folder is a patched checkpoint as it was written."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"it has no {MANIFEST}.")
    Manifest.read(folder).check_files(folder)


def _compare(folder: str | Path, path: str, got: FileRecord, expected: FileRecord) -> None:
    if got.sha256 != expected.sha256:
        raise VerificationError(
            f"{Path(folder) / path}: its bytes changed since patching, so the source can't be had "
            f"from it. {RESTORE}"
        )


def _public_name(checkpoint: Checkpoint) -> str:
    """A hub id, or the last part of a path: records name no place of this machine."""
    if Path(checkpoint.name).expanduser().exists():
        return (checkpoint.file or checkpoint.root.resolve()).name
    return checkpoint.name
