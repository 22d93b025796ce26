"""Write a patched checkpoint from its source, from a patched model, or the source from it."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrofit.artifact.adapter import ADAPTER_FILES
from retrofit.artifact.copying import Advance, copy_files, folder_mode, keep_private, total_size
from retrofit.artifact.planning import Plan, plan_patch, prove
from retrofit.artifact.records import describe_patch, write_learned
from retrofit.artifact.verifying import require_patched
from retrofit.artifact.writing import new_folder, refuse_full_disk, refuse_output
from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.fingerprint import LEARNED, FileRecord
from retrofit.checkpoints.layouts import Checkpoint
from retrofit.checkpoints.manifest import (
    MANIFEST,
    RESTORE,
    Manifest,
)
from retrofit.checkpoints.opening import check_weights
from retrofit.runtime.errors import CheckpointError, InputError, VerificationError
from retrofit.runtime.versions import current_versions


def ignore_progress(amount: int) -> None:
    """The default for everything that reports bytes."""


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
        RetrofitError: If the disk is too full, or the source changed since it was planned.
    """
    out = Path(out).expanduser()
    refuse_target(plan, out, force=force)
    check_weights(plan.checkpoint)
    if not link:
        refuse_full_disk(out, plan.num_bytes)
    with new_folder(out, replace=force, mode=_mode(plan.checkpoint)) as folder:
        manifest = Manifest(
            source=public_name(plan.checkpoint),
            **describe_patch(plan.handle),
            files=copy_files(plan.files, folder, link=link, advance=advance, states=plan.states),
            configs={
                **copy_files(plan.configs, folder, link=False, advance=advance, states=plan.states),
                **write_learned(plan.recipe, folder),
            },
            single_file=plan.checkpoint.file.name if plan.checkpoint.file else "",
            versions=current_versions(),
            proof=proof,
        )
        manifest.write(folder)
        keep_private(folder, folder / MANIFEST)
        refuse_target(plan, out, force=force)  # what is there now, not what was
    return manifest


CARD = "README.md"  # of a fine-tuned checkpoint


def refuse_target(plan: Plan, out: Path, *, force: bool) -> None:
    """Check, before anything is computed, that the output may be written."""
    names = {*plan.files, *plan.configs, LEARNED, CARD, *ADAPTER_FILES}
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
    from retrofit.artifact.loading import patch_of
    from retrofit.artifact.origin import check_unchanged, find_origin
    from retrofit.runtime.devices import pick_device

    handle = patch_of(target)
    recipe = replace(handle.recipe, learned=handle.state_dict() or None)
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
    if manifest.has_own_weights:
        raise InputError(
            f"{folder}: was fine-tuned, so the weights of its source are not in it. Take the "
            f"source itself: {manifest.source}."
        )
    files = {path: checkpoint.root / path for path in manifest.files}
    source_only = replace(manifest, configs={})

    def refuse() -> None:
        root, names = checkpoint.root, set(files)
        refuse_output(out, root, force=force, names=names, check_earlier=source_only.check_files)

    refuse()
    manifest.check_files(checkpoint.root)
    if not link:
        refuse_full_disk(out, total_size(files))
    with new_folder(out, replace=force, mode=folder_mode(checkpoint.root)) as hidden:
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


def _mode(checkpoint: Checkpoint) -> int | None:
    """The permissions of a copy's folder; None are the usual ones."""
    if checkpoint.file is None:
        return folder_mode(checkpoint.root)
    is_private = not checkpoint.file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    return stat.S_IRWXU if is_private else None


def public_name(checkpoint: Checkpoint) -> str:
    """A hub id, or the last part of a path: records name no place of this machine."""
    if Path(checkpoint.name).expanduser().exists():
        return (checkpoint.file or checkpoint.root.resolve()).name
    return checkpoint.name
