"""Find the files that a model in memory came from, and check that it still holds their weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrofit.checkpoints import Checkpoint, find_checkpoint
from retrofit.layout.sites import LEARNED
from retrofit.patching.networks import is_pipeline
from retrofit.runtime.errors import InputError, NotFoundError, UnsupportedError

CHANGED = (
    "`save` copies the files it was loaded from and would lose that. Undo the change, or save the "
    "model with its own library and patch what that wrote."
)


def find_origin(target: Any) -> Checkpoint:
    """The checkpoint that a model or pipeline was loaded from, its patch aside.

    Raises:
        InputError: If it was not loaded from one.
    """
    config = getattr(target, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(target, "name_or_path", None)
    if not name:
        raise InputError(
            f"{type(target).__name__}: not loaded from a checkpoint, so there are no files to "
            "copy. Save it with its own library, load it with `from_pretrained` and patch that."
        )
    checkpoint = replace(find_checkpoint(name), manifest=None)
    if is_pipeline(target) or checkpoint.pipeline_class is None:
        return checkpoint
    return _own_component(target, checkpoint)


def check_unchanged(target: Any, checkpoint: Checkpoint) -> None:
    """Compare every weight in memory with the files.

    Raises:
        UnsupportedError: If one differs.
    """
    from torch import nn

    from retrofit.checkpoints.opening import load_networks

    if not is_pipeline(target):
        _compare_weights(target, load_networks(checkpoint, [""], device="cpu"), checkpoint, "")
        return
    for name, component in target.components.items():
        if isinstance(component, nn.Module) and name in checkpoint.classes:
            loaded = load_networks(checkpoint, [name], device="cpu").components[name]
            _compare_weights(component, loaded, checkpoint, name)
        elif isinstance(component, nn.Module):
            raise UnsupportedError(f"{name}: not in {checkpoint.name}. {CHANGED}")
    _warn_of_scheduler(target, checkpoint)


def _own_component(target: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The folder of a component that was loaded with `subfolder`."""
    class_name = type(target).__name__
    for name, (_, listed) in checkpoint.classes.items():
        if listed == class_name:
            folder = checkpoint.weight_folder(name)
            return replace(find_checkpoint(folder), manifest=None)
    raise NotFoundError(f"{checkpoint.name}: has no component of class {class_name}.")


def _compare_weights(model: Any, loaded: Any, checkpoint: Checkpoint, name: str) -> None:
    model = getattr(model, "_orig_mod", model)
    where = f"{checkpoint.name}{f'/{name}' if name else ''}"
    own_parts = f".{LEARNED}."  # of the patch, which are saved beside the files
    mine = {name: x for name, x in model.state_dict().items() if own_parts not in f".{name}"}
    files = loaded.state_dict()
    extra = sorted(mine.keys() ^ files.keys())
    inner = _wrapped_at(mine, files)
    if inner:
        wrapper = type(model).__name__
        raise UnsupportedError(
            f"{where}: {wrapper} wraps the network of these files, which save copies. Save that: "
            f"`network = model.get_submodule({inner!r})`, `retrofit.patch(network, ...)`, "
            "`retrofit.save(network, OUT)`, after `remove()` of this patch."
        )
    if extra:
        raise UnsupportedError(f"{where}: {extra[0]} was added or taken away. {CHANGED}")
    for key, tensor in files.items():
        if mine[key].is_meta:
            raise UnsupportedError(
                f"{where}: {key} is offloaded and can't be compared with the files. Load the model "
                "without offloading to save it."
            )
        own = mine[key].detach().cpu()
        # a cast is a way of loading, not another weight
        if not _holds_the_same(own, tensor):
            raise UnsupportedError(f"{where}: {key} changed since it was loaded. {CHANGED}")


def _wrapped_at(mine: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """Where in a model the network of its files is, as in a SentenceTransformer; empty if not."""
    if not files or files.keys() & mine.keys():
        return ""
    key = next(iter(files))
    places = (name.removesuffix(f".{key}") for name in mine if name.endswith(f".{key}"))
    return next((at for at in places if all(f"{at}.{name}" in mine for name in files)), "")


def _holds_the_same(own: Any, stored: Any) -> bool:
    """Whether a weight is that of the file, cast or not; quantised ones part by part."""
    import torch

    if not hasattr(own, "__tensor_flatten__") and not hasattr(stored, "__tensor_flatten__"):
        return own.shape == stored.shape and torch.equal(stored.to(own.dtype), own)
    if type(own) is not type(stored):
        return False
    parts, layout = own.__tensor_flatten__()
    others, other_layout = stored.__tensor_flatten__()
    return (parts, str(layout)) == (others, str(other_layout)) and all(
        _holds_the_same(getattr(own, part), getattr(stored, part)) for part in parts
    )


def _warn_of_scheduler(pipeline: Any, checkpoint: Checkpoint) -> None:
    folder = Path(checkpoint.root) / "scheduler"
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or not folder.is_dir():
        return
    listed = type(scheduler).load_config(str(folder))
    if listed.get("_class_name") != type(scheduler).__name__:
        warnings.warn(
            f"{type(scheduler).__name__}: replaced the checkpoint's {listed.get('_class_name')}, "
            "which is what gets saved. Set it again after `retrofit.load`.",
            stacklevel=4,
        )
