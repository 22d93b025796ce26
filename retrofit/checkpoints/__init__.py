"""Find a checkpoint: a folder, a hub id or a single file.

Only configs are read here and in `layouts`, which says what a checkpoint is made of; `weights`
looks at the weights, `opening` builds and loads the networks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path

from retrofit.checkpoints import hub
from retrofit.checkpoints.bundled import BUNDLED, resolve_bundled
from retrofit.checkpoints.layouts import (
    Checkpoint,
    identify,
    identify_own_file,
    join_configs,
    read_json,
)
from retrofit.checkpoints.single_file import guess_config_repo
from retrofit.checkpoints.weights import PICKLES, find_weights, refuse_pickle
from retrofit.runtime.errors import CheckpointError, NotFoundError, RetrofitError
from retrofit.runtime.outputs import PARTIAL
from retrofit.runtime.reading import require_regular

__all__ = ["HUB_ID", "Checkpoint", "find_checkpoint", "identify", "read_json"]

NEAR = 0.6  # likeness of a name from which on it may have been meant
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")


def find_checkpoint(model: str | Path, *, weights: bool = True, config: str = "") -> Checkpoint:
    """Find a checkpoint and read its configs.

    Args:
        model: A folder (pipeline, one component, transformers model), a hub id
            (`owner/name[/folder][@revision]`), a single `.safetensors` file, or `shapes` or
            `rooms`, the small models that come with the source.
        weights: Whether a hub id fetches weights too.
        config: For a single file: a folder or hub id with its configs.

    Raises:
        NotFoundError: If there is nothing of that name.
        CheckpointError: If it is not a checkpoint, an interrupted write, or a pickle.
    """
    path, matched = locate(model)
    if matched is not None:
        return _fetch(str(model), *matched.groups(), weights=weights, config=config)
    if path.is_dir():
        if config:
            raise CheckpointError(
                f"--config {config}: is for a single file, and {model} is a folder with configs of "
                "its own. Leave it out."
            )
        return identify(path, str(model))
    require_regular(path, path.stat())
    return _single_file(path, str(model), config)


def locate(model: str | Path) -> tuple[Path, re.Match[str] | None]:
    """Where a checkpoint lies, or the parts of its hub id if it is nowhere on the disk.

    Raises:
        NotFoundError: If there is nothing of that name.
        CheckpointError: If it is left over from an interrupted write.
    """
    if not str(model).strip():
        raise NotFoundError(
            "MODEL: expected a folder, a .safetensors file, a hub id, `shapes` or `rooms`, got an "
            "empty name. The present folder is `.`."
        )
    path = Path(resolve_bundled(model)).expanduser()
    _refuse_partial(path)
    if path.exists():
        return path, None
    matched = HUB_ID.fullmatch(str(model))
    if matched is None or _is_misspelt(path):
        raise NotFoundError(f"{model}: no such folder or file. {_nearby(path, BUNDLED)}")
    return path, matched


def _single_file(path: Path, name: str, config: str) -> Checkpoint:
    if path.suffix in PICKLES:
        raise refuse_pickle(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{name}: expected a folder or a .safetensors file, got {path.suffix or 'neither'}. "
            "Give the checkpoint's folder."
        )
    if (path.parent / "config.json").is_file() and not config:
        raise CheckpointError(f"{name}: one file of a checkpoint. Give its folder: {path.parent}.")
    own = None if config else identify_own_file(path, name, None)
    if own is not None:
        return own
    source = config or guess_config_repo(path)
    try:
        configs = _open_configs(source)
    except RetrofitError as error:
        raise NotFoundError(
            f"{name}: its configs, which a single file lacks, can't be had. Give a folder that has "
            f"them with --config. ({error})"
        ) from error
    return join_configs(configs, path, name, None)


def _open_configs(source: str) -> Checkpoint:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return identify(folder, source)
    matched = HUB_ID.fullmatch(source)
    if matched is None:
        raise NotFoundError(f"{source}: no such folder. {_nearby(folder)}")
    repo, inside, revision = matched.groups()
    return identify(hub.fetch(repo, hub.TEXTS, revision=revision) / inside.strip("/"), source)


def _fetch(
    name: str, repo: str, folder: str, revision: str | None, *, weights: bool, config: str
) -> Checkpoint:
    folder = folder.strip("/")
    if folder.endswith((".safetensors", *PICKLES)):
        path = hub.fetch(repo, [folder], revision=revision) / folder
        if not path.is_file():
            raise NotFoundError(f"{repo}: has no file {folder!r}. Look at its files on the hub.")
        return _single_file(path, name, config)
    prefix = f"{folder}/" if folder else ""
    configs = [prefix + pattern for pattern in hub.CONFIGS]
    path = hub.fetch(repo, configs, revision=revision) / folder
    if not path.is_dir() or not any(path.iterdir()):
        raise NotFoundError(f"{name}: has no configs of diffusers or transformers on the hub.")
    found = identify(path, name)
    if weights:
        # only what the checkpoint is made of: repositories also keep the same weights as one file
        inside = [f"{prefix}{part}/" for part in _parts(path)] or [prefix]
        patterns = [p + glob for p in inside for glob in (*hub.TEXTS, hub.WEIGHTS)]
        patterns += [prefix + glob for glob in hub.TEXTS]
        hub.fetch(repo, patterns, revision=revision, ignore=hub.VARIANTS)
        if not all(find_weights(found.weight_folder(part)) for part in found.classes):
            hub.fetch(repo, patterns, revision=revision)
        found = identify(path, name)
    return found


def _parts(folder: Path) -> list[str]:
    """Folders that a pipeline's index lists."""
    file = folder / "model_index.json"
    if not file.is_file():
        return []
    return [k for k, v in read_json(file).items() if isinstance(v, list) and len(v) == 2 and v[0]]


def _refuse_partial(path: Path) -> None:
    for part in path.absolute().parts:
        if PARTIAL in part:
            raise CheckpointError(
                f"{path}: left over from an interrupted run, not a checkpoint. Delete it, or run "
                "the command again, which does."
            )


def _is_misspelt(path: Path) -> bool:
    """Whether something of nearly that name lies here, which a hub id would be a surprise for."""
    in_folder = path.parent.is_dir() and str(path.parent) != "."
    return in_folder and bool(difflib.get_close_matches(path.name, _names_beside(path), cutoff=0.8))


def _names_beside(path: Path) -> list[str]:
    """Names of what may be checkpoints in the folder where the user looked, if there is one."""
    return [
        entry.name
        for entry in (path.parent.iterdir() if path.parent.is_dir() else ())
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix == ".safetensors")
    ]


def _nearby(path: Path, bundled: Collection[str] = ()) -> str:
    """What is called nearly so: beside it, or among the bundled checkpoints, which are listed.

    Nothing of the root, which nobody keeps checkpoints in.
    """
    parent = path.absolute().parent
    beside = [] if parent == parent.parent else _names_beside(path)
    names = sorted({*beside, *bundled})
    near = difflib.get_close_matches(path.name, names, cutoff=NEAR)
    said = [f"Did you mean {' or '.join(near)}?"] if near else []
    said += [f"Bundled models: {', '.join(sorted(bundled))}."] if bundled else []
    return " ".join([*said, "A hub id looks like `owner/name`."])
