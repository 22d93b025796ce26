"""The state of a training on disk: safetensors and JSON, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.artifact.writing import new_folder
from retrofit.runtime.errors import CheckpointError
from retrofit.runtime.reading import JSON_BYTES, parse_json, read_bytes

TENSORS, FACTS = "state.safetensors", "state.json"
PREFIX = "step-"


def save_state(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Write the state after a step; a run that dies while writing leaves the previous one."""
    from safetensors.torch import save_file

    with new_folder(folder / f"{PREFIX}{step:07d}", replace=True) as hidden:
        plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(plain, hidden / TENSORS)
        with (hidden / TENSORS).open("rb") as stream:
            os.fsync(stream.fileno())
        (hidden / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def find_states(folder: Path) -> list[Path]:
    """States on disk, the oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / FACTS).is_file())


def forget_states(folder: Path, keep: int) -> None:
    """Delete all but the newest states."""
    for path in find_states(folder)[: -keep or None]:
        shutil.rmtree(path)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a state.

    Raises:
        CheckpointError: If a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / TENSORS), parse_json(read_bytes(folder / FACTS, JSON_BYTES))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: can't be read ({error}). Delete this folder to go on from the state before."
        ) from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and plain facts."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            store: dict[str, Any] = tensors if isinstance(value, Tensor) else facts
            store[f"{index}.{name}"] = value
    return tensors, {"entries": facts, "groups": state["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Put back what `pack_optimizer` gave."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **facts["entries"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
