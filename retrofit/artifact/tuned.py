"""Write a fine-tuned checkpoint: the source's files with new weights, an adapter, or gates.

Weights that belong to the new attention are marked, so that no ordinary loader takes them for a
dense model's: diffusers and transformers refuse the folder and name retrofit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from retrofit.artifact.adapter import ADAPTER_FOLDER, CONFIG, TENSORS
from retrofit.artifact.copying import copy_files
from retrofit.artifact.planning import Plan
from retrofit.artifact.proof import make_proof
from retrofit.artifact.records import describe_patch, write_learned
from retrofit.artifact.saving import CARD, public_name, refuse_target
from retrofit.artifact.writing import new_folder, refuse_full_disk
from retrofit.checkpoints import identify, read_json
from retrofit.checkpoints.fingerprint import FileRecord
from retrofit.checkpoints.layouts import TUNED_LIBRARY, TUNED_TYPE
from retrofit.checkpoints.manifest import Manifest
from retrofit.checkpoints.opening import load_networks
from retrofit.checkpoints.weights import read_header
from retrofit.runtime.errors import UnsupportedError
from retrofit.runtime.versions import current_versions


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a fine-tune made.

    Attributes:
        weights: New values of the source's own weights, by component and name in its network.
        adapter: A LoRA adapter in peft's format, `(config, tensors)`.
        learned: Learned parts, as `Patch.state_dict` gives them.
        record: What `retrofit.json` says of the fine-tune.
        card: The model card.
    """

    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    adapter: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None
    learned: Mapping[str, Tensor] | None = None
    record: Mapping[str, Any]
    card: str


def find_places(plan: Plan, component: str, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """In which of the source's files each weight of a network lies, and under which name.

    Raises:
        UnsupportedError: If one is in none of them under a name that is recognised.
    """
    root = plan.checkpoint.root
    files = [
        path
        for path in plan.files
        if path.endswith(".safetensors") and (Path(path).parent.as_posix() == (component or "."))
    ]
    stored = {name: path for path in files for name in read_header(root / path)}
    found = {}
    for name in names:
        same = [key for key in stored if key == name or _is_inside(key, name)]
        if len(same) != 1:
            raise UnsupportedError(
                f"{plan.checkpoint.name}: expected {name} in its weight files once, got "
                f"{len(same)} of that name. Save the model anew with `save_pretrained` first, or "
                "take --train lora."
            )
        found[name] = (stored[same[0]], same[0])
    return found


def write_tuned(
    plan: Plan,
    out: Path,
    tuned: Tuned,
    *,
    device: str,
    seed: int = 0,
    force: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Manifest:
    """Write a fine-tuned checkpoint, whole or not at all, and prove it.

    Args:
        plan: Of the patched source.
        out: The new folder.
        tuned: What was learned.
        device: Where the proof is made.
        seed: Of the proof's inputs.
        force: Replace an earlier result.
        say: Told what is going on.

    Raises:
        InputError: If `out` can't be written.
    """
    refuse_target(plan, out, force=force)
    refuse_full_disk(out, plan.num_bytes)
    recipe = plan.recipe if tuned.learned is None else replace(plan.recipe, learned=tuned.learned)
    changed = _changed_files(plan, tuned)
    kept = {path: file for path, file in plan.files.items() if path not in {*changed, CARD}}
    with new_folder(out, replace=force) as folder:
        records = copy_files(
            kept, folder, link=False, advance=lambda amount: None, states=plan.states
        )
        for path, write in changed.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write(folder / path)
            records[path] = FileRecord.of(folder / path)
        configs = {**write_learned(recipe, folder), **_write_adapter(tuned, folder)}
        (folder / CARD).write_text(tuned.card, encoding="utf-8")
        configs[CARD] = FileRecord.of(folder / CARD)
        say("proving the patch with its new weights ...")
        target = load_networks(identify(folder, str(out)), plan.components, device=device)
        if tuned.adapter is not None:
            from retrofit.artifact.adapter import add_adapter

            add_adapter(target, recipe.components, folder)
        manifest = Manifest(
            source=public_name(plan.checkpoint),
            **describe_patch(plan.handle),
            files=records,
            configs=configs,
            versions=current_versions(),
            proof=make_proof(target, recipe, seed=seed, device=device),
            tuned=tuned.record,
        )
        manifest.write(folder)
    return manifest


def _is_inside(key: str, name: str) -> bool:
    """Whether two names are one tensor's, one of them with the base model's prefix (`bert.`)."""
    return key.endswith(f".{name}") and "." not in key[: -len(name) - 1]


def _changed_files(plan: Plan, tuned: Tuned) -> dict[str, Callable[[Path], None]]:
    """How to write each file that is not the source's any more, by path."""
    root = plan.checkpoint.root
    changed: dict[str, Callable[[Path], None]] = {}
    for component, weights in tuned.weights.items():
        by_file: dict[str, dict[str, Tensor]] = {}
        for name, (path, key) in find_places(plan, component, weights).items():
            by_file.setdefault(path, {})[key] = weights[name]
        for path, tensors in by_file.items():
            changed[path] = _replacing(root / path, tensors)
        if component:
            changed["model_index.json"] = _marking_index(root, list(tuned.weights))
        else:
            changed["config.json"] = _marking_config(root)
    return changed


def _replacing(source: Path, tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """Writes a weight file with some tensors replaced, in the precision that they had."""

    def write(target: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(source, "pt") as stream:
            metadata = stream.metadata()
            stored = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            stored[name] = tensor.to(stored[name].dtype).reshape(stored[name].shape).contiguous()
        save_file(stored, target, metadata=metadata)

    return write


def _marking_index(root: Path, components: list[str]) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        index = read_json(root / "model_index.json")
        for component in components:
            index[component] = [TUNED_LIBRARY, index[component][1]]
        target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    return write


def _marking_config(root: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        config = read_json(root / "config.json")
        config["model_type"] = TUNED_TYPE + config["model_type"]
        target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return write


def _write_adapter(tuned: Tuned, folder: Path) -> dict[str, FileRecord]:
    if tuned.adapter is None:
        return {}
    from safetensors.torch import save_file

    config, tensors = tuned.adapter
    place = folder / ADAPTER_FOLDER
    place.mkdir()
    (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: x.contiguous() for name, x in tensors.items()}, place / TENSORS)
    return {
        f"{ADAPTER_FOLDER}/{file.name}": FileRecord.of(file) for file in sorted(place.iterdir())
    }
