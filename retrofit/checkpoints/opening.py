"""Build the networks of a checkpoint without weights, or load them, or all of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from retrofit.checkpoints import Checkpoint, read_json
from retrofit.checkpoints.accounting import check_tensors
from retrofit.checkpoints.components import build_component, load_component
from retrofit.checkpoints.layouts import TUNED_LIBRARY
from retrofit.checkpoints.libraries import (
    LIBRARIES,
    conversion_command,
    dtype_argument,
    failing_as_checkpoint_error,
    torch_dtype,
)
from retrofit.checkpoints.quantization import require_packages
from retrofit.checkpoints.warned import collecting_warnings
from retrofit.checkpoints.weights import Weights, check_file, check_folder
from retrofit.runtime.devices import on_accelerator
from retrofit.runtime.errors import CheckpointError, NotFoundError, UnsupportedError, suggest

if TYPE_CHECKING:
    from torch import nn


class ComponentSet:
    """Networks of a pipeline without the rest of it; `patch` takes it as it takes the pipeline.

    Attributes:
        components: Networks by name.
    """

    def __init__(self, components: dict[str, Any]) -> None:
        """Hold the networks."""
        self.components = components


def check_weights(
    checkpoint: Checkpoint, components: Sequence[str] | None = None
) -> dict[str, Weights]:
    """Check that all weights are there and whole, before anything runs.

    Args:
        checkpoint: Where to look.
        components: Only these; None checks every component.

    Returns:
        The weights of each component.

    Raises:
        CheckpointError: If a shard is missing or corrupt, or there are only pickles.
    """
    require_packages(checkpoint, checkpoint.classes if components is None else components)
    if checkpoint.file is not None:
        return dict.fromkeys(checkpoint.classes, check_file(checkpoint.file))
    found: dict[str, Weights] = {}
    for name, (library, class_name) in checkpoint.classes.items():
        if components is None or name in components:
            convert = conversion_command(checkpoint, library, class_name)
            found[name] = check_folder(checkpoint.weight_folder(name), convert=convert)
            if library != "retrofit":
                found[name].require_metadata()
    return found


def account_for_weights(
    checkpoint: Checkpoint,
    components: Sequence[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Weights]:
    """`check_weights`, and where every tensor of the files goes.

    Args:
        checkpoint: Where to look.
        components: Only these; None looks at every component, and at parts that are not there.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Returns:
        The weights of each component.

    Raises:
        CheckpointError: As `check_weights`, and if tensors are missing, do not fit, or would be
            left out although they change what a network computes. Others are named in a note.
    """
    weights = check_weights(checkpoint, components)
    if components is None:
        require_parts(checkpoint)
    check_tensors(checkpoint, weights, trust_remote_code=trust_remote_code)
    return weights


def require_parts(checkpoint: Checkpoint) -> None:
    """Check that the parts are there that a pipeline can't run without.

    Raises:
        CheckpointError: If `model_index.json` has none where its class asks for one.
    """
    if checkpoint.pipeline_class is None:
        return
    import diffusers

    cls = getattr(diffusers, checkpoint.pipeline_class, None)
    if cls is None:  # a class that comes with the checkpoint
        return
    index = read_json(checkpoint.configs / "model_index.json")
    expected, _ = cls._get_signature_keys(cls)
    needed = set(expected) - set(cls._optional_components)
    absent = sorted(name for name in needed if not any(index.get(name) or ()))
    if absent:
        raise CheckpointError(
            f"{checkpoint.name}: its model_index.json names no {' and no '.join(absent)}, and "
            f"{checkpoint.pipeline_class} can't run without. Fetch the whole checkpoint, or give "
            "the folder of one network."
        )


def dtype_to_run(
    checkpoint: Checkpoint,
    device: str,
    asked: str | None,
    components: Sequence[str] | None = None,
) -> str | None:
    """The dtype to load in: on a CPU float16 becomes float32, several times as fast there.

    Args:
        checkpoint: Where to look.
        device: Where it runs.
        asked: What the user wants, which is always taken.
        components: Only these count; None looks at every component.

    Returns:
        A dtype's name; None keeps the checkpoint's own.
    """
    if asked is not None or on_accelerator(device):
        return asked
    found = {weights.dtype for weights in check_weights(checkpoint, components).values()}
    return "float32" if "float16" in found else None


def build_networks(
    checkpoint: Checkpoint, components: Sequence[str] = (), *, trust_remote_code: bool = False
) -> Any:
    """Build networks on the meta device, from configs alone.

    Args:
        checkpoint: Where to look.
        components: Networks of a pipeline; empty takes those that denoise.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Returns:
        What `patch` takes: a module, or a `ComponentSet` for a pipeline.

    Raises:
        NotFoundError: If a named component does not exist.
        UnsupportedError: If a class is not known.
    """
    import torch

    from retrofit.families import find_family

    _refuse_remote_code(checkpoint, trust_remote_code)
    if checkpoint.pipeline_class is None:
        if components:
            raise NotFoundError(
                f"{checkpoint.name}: component {components[0]!r} does not exist, this is a single "
                "network. Leave `--component` out."
            )
        with torch.device("meta"):
            return build_component(checkpoint, "", trust_remote_code)
    for name in components:
        if name not in checkpoint.classes:
            raise NotFoundError(
                f"{checkpoint.name}: component {name!r} does not exist. "
                f"{suggest(name, checkpoint.classes)}"
            )
    built: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name in components or _likely_first(checkpoint):
            if checkpoint.classes[name][0] in LIBRARIES:
                built[name] = build_component(checkpoint, name, trust_remote_code)
    denoising = {
        name: module
        for name, module in built.items()
        if (family := find_family(module)) is not None and family.denoises
    }
    return ComponentSet(built if components or not denoising else denoising)


def load_networks(
    checkpoint: Checkpoint,
    components: Sequence[str],
    *,
    device: str,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load networks with their weights.

    Args:
        checkpoint: Where to look.
        components: Names as in `Checkpoint.classes`.
        device: Where they go.
        dtype: Of the weights; None keeps the checkpoint's own.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Returns:
        What `patch` takes: a module, or a `ComponentSet` for a pipeline.

    Raises:
        CheckpointError: If weights are missing or do not fit the config.
    """
    _refuse_remote_code(checkpoint, trust_remote_code)
    weights = account_for_weights(checkpoint, components, trust_remote_code=trust_remote_code)
    loaded = {
        name: load_component(checkpoint, name, weights[name], dtype, trust_remote_code).to(device)
        for name in components
    }
    return loaded[""] if checkpoint.pipeline_class is None else ComponentSet(loaded)


def load_whole(
    checkpoint: Checkpoint,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint as its library does: a model, or a whole pipeline.

    Args:
        checkpoint: Where to look.
        device: Where it goes; None leaves it on the CPU.
        dtype: Of the weights; None keeps the checkpoint's own.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: If weights are missing or do not fit the config.
    """
    if checkpoint.pipeline_class is None:
        return load_networks(
            checkpoint,
            [""],
            device=device or "cpu",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    import diffusers

    weights = account_for_weights(checkpoint, trust_remote_code=trust_remote_code)
    dtypes = {name: torch_dtype(dtype or found.dtype) for name, found in weights.items()}
    with failing_as_checkpoint_error(checkpoint), collecting_warnings():
        if checkpoint.file is not None:
            pipeline_class = getattr(diffusers, str(checkpoint.pipeline_class))
            pipeline = pipeline_class.from_single_file(
                str(checkpoint.file),
                config=str(checkpoint.configs),
                **{dtype_argument(): next(iter(dtypes.values()), None)},
            )
        else:
            variants = sorted({found.variant for found in weights.values()} - {None}, key=str)
            with _without_mark(checkpoint) as folder:
                # dtypes may differ between components, which a single one would flatten
                pipeline = diffusers.DiffusionPipeline.from_pretrained(
                    str(folder),
                    use_safetensors=True,
                    variant=variants[0] if variants else None,
                    trust_remote_code=trust_remote_code,
                    **{dtype_argument(): {"default": next(iter(dtypes.values()), None), **dtypes}},
                )
    return pipeline if device is None else pipeline.to(device)


@contextmanager
def _without_mark(checkpoint: Checkpoint) -> Iterator[Path]:
    """A pipeline's folder whose index diffusers reads, also where weights are fine-tuned."""
    index = read_json(checkpoint.root / "model_index.json")
    marked = [name for name, entry in index.items() if _is_marked(entry)]
    if not marked:
        yield checkpoint.root
        return
    with TemporaryDirectory() as place:
        folder = Path(place)
        for path in checkpoint.root.iterdir():
            if path.name != "model_index.json":
                (folder / path.name).symlink_to(path.resolve())
        index |= {name: ["diffusers", index[name][1]] for name in marked}
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder


def _is_marked(entry: object) -> bool:
    return isinstance(entry, list) and entry[:1] == [TUNED_LIBRARY]


def _likely_first(checkpoint: Checkpoint) -> list[str]:
    """Components that may denoise: diffusers' own, or all where it has none."""
    own = [name for name, (library, _) in checkpoint.classes.items() if library == "diffusers"]
    return own or list(checkpoint.classes)


def _refuse_remote_code(checkpoint: Checkpoint, trusted: bool) -> None:
    if not checkpoint.remote_code or trusted:
        return
    import transformers

    if not hasattr(transformers, checkpoint.classes[""][1]):
        raise UnsupportedError(
            f"{checkpoint.name}: needs code that comes with it (auto_map: "
            f"{', '.join(checkpoint.remote_code)}). If you trust it, add --trust-remote-code."
        )
