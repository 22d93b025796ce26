"""Find, read and write the checkpoints of the networks in this package (safetensors only)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from retrofit.runtime.errors import CheckpointError, NotFoundError
from retrofit.runtime.reading import JSON_BYTES, parse_json, read_bytes

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

ModelT = TypeVar("ModelT", bound=nn.Module)


def find_checkpoint(source: str | Path, **hub: Any) -> tuple[dict[str, Any], list[Path]]:
    """Locate a checkpoint and read its config.

    Args:
        source: A folder, a `.safetensors` file, or a hub id.
        **hub: Passed to `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`,
            `local_files_only`).

    Returns:
        The config (empty if there is no `config.json`) and the weight files.

    Raises:
        NotFoundError: If neither a path nor a repository of that name can be read.
        CheckpointError: If it has no safetensors weights, or its json files are no json.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_json(path.with_name(CONFIG_NAME)), [path]
    if path.is_dir():
        return _read_json(path / CONFIG_NAME), _local_weights(path)
    if str(source).count("/") != 1 or str(source)[0] in "./~":
        raise NotFoundError(f"{source}: no such file or folder. Give a path, or a hub id.")
    config = _download(str(source), CONFIG_NAME, hub)
    index = _download(str(source), INDEX_NAME, hub)
    names = [WEIGHTS_NAME] if index is None else _shard_names(index)
    files = [_download(str(source), name, hub) for name in names]
    found = [file for file in files if file is not None]
    if len(found) != len(names):
        raise CheckpointError(f"{source}: expected {', '.join(names)} in it. {_NO_SAFETENSORS}")
    return {} if config is None else _read_json(config), found


def load_weights(
    build: Callable[[], ModelT],
    files: Iterable[Path],
    *,
    ignored: Callable[[str], bool],
    dtype_of: Callable[[str], torch.dtype | None],
    device: torch.device | str = "cpu",
) -> tuple[ModelT, tuple[str, ...]]:
    """Build a model without memory and fill it from safetensors files, tensor by tensor.

    Args:
        build: Makes the model; called on the meta device.
        files: The weight files.
        ignored: Says which names to read past.
        dtype_of: Dtype for a name, None to keep the file's.
        device: Where the tensors go.

    Returns:
        The model in evaluation mode, and the names that were read past.

    Raises:
        CheckpointError: If a file is corrupt, or names or shapes are not the model's.
    """
    with torch.device("meta"):
        model = build()
    state: dict[str, Tensor] = {}
    skipped: list[str] = []
    for file in files:
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if ignored(name):
                        skipped.append(name)
                    else:
                        state[name] = opened.get_tensor(name).to(dtype_of(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: expected a safetensors file, got {error}. Download it again."
            ) from error
    check_names(model.state_dict(), state, str(next(iter(files), "checkpoint")))
    model.load_state_dict(state, assign=True)
    return model.eval(), tuple(sorted(skipped))


def check_names(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights whose names or shapes are not the model's.

    Raises:
        CheckpointError: With the first few of each kind of difference.
    """
    problems = []
    for kind, names in (
        ("missing", sorted(expected.keys() - got.keys())),
        ("unknown", sorted(got.keys() - expected.keys())),
    ):
        if names:
            problems.append(f"{len(names)} {kind} ({_first(names)})")
    shapes = [
        f"{name} {list(got[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & got.keys())
        if got[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_first(shapes)})")
    if problems:
        raise CheckpointError(
            f"{where}: expected the {len(expected)} tensors of its config, got"
            f" {'; '.join(problems)}. Give the config that the weights were saved with."
        )


def save_checkpoint(model: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, as `from_pretrained` reads them.

    Args:
        model: Its state dict is written, in its own dtypes.
        config: Nested config.
        folder: Made if it does not exist; files of these names are replaced.
    """
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    partial = target / f".{WEIGHTS_NAME}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(target / WEIGHTS_NAME)
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


_NO_SAFETENSORS = "Only safetensors weights are read; save a model.pt again with save_file."


def _local_weights(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    names = _shard_names(index) if index.is_file() else [WEIGHTS_NAME]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: expected {', '.join(missing)} in it. {_NO_SAFETENSORS}")
    return [folder / name for name in names]


def _shard_names(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_shard, weight_map.values() or [None])):
        raise CheckpointError(
            f"{index}: expected a weight_map from tensors to files beside it. Download it again."
        )
    return sorted(set(weight_map.values()))


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = parse_json(read_bytes(file, JSON_BYTES))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: expected json, got {error}. Write it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected an object, got {type(values).__name__}.")
    return values


def _download(repo: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a repository, None if the repository does not have it."""
    try:
        return Path(hf_hub_download(repo, name, **hub))
    except GatedRepoError as error:
        raise NotFoundError(
            f"{repo}: access has to be asked for on its page. Then run `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise NotFoundError(
            f"{repo}: no such folder, and no such repository or revision on the hub."
            " Check the name, or run `hf auth login` for a private one."
        ) from error
    except LocalEntryNotFoundError as error:
        if name == INDEX_NAME:  # most repositories have none, which offline cannot be told apart
            return None
        raise NotFoundError(
            f"{repo}: {name} is not in the local cache and the hub was not reached."
            " Connect, or give a folder."
        ) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{repo}: the hub refused {name}: {error}. Try again, or give a folder."
        ) from error


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
