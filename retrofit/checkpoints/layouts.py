"""What a checkpoint is made of, read from the configs of a folder that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from retrofit.architectures.recognition import recognise_config, recognise_tensors
from retrofit.checkpoints.config_limits import CONFIGS, check_numbers
from retrofit.checkpoints.manifest import MANIFEST, Manifest
from retrofit.checkpoints.places import is_plain_name
from retrofit.checkpoints.single_file import denoising_component, holds_pipeline
from retrofit.checkpoints.weights import find_weights, read_header
from retrofit.runtime.errors import CheckpointError
from retrofit.runtime.reading import JSON_BYTES, parse_json, read_bytes, require_regular
from retrofit.runtime.schema import OTHER_KEYS, find_problems

Layout = Literal["pipeline", "diffusers", "transformers", "retrofit", "single-file"]
# what of a pipeline is no network
WITHOUT_CONFIG = (
    "Scheduler",
    "Tokenizer",
    "TokenizerFast",
    "Processor",
    "ProcessorFast",
    "Extractor",
)
# where a model_index.json names it, diffusers refuses to open the weights as those of a dense model
TUNED_LIBRARY = "retrofit_attention"
TUNED_TYPE = "retrofit_"  # in front of a `model_type`, which transformers refuses likewise
CONFIG_FOLDER = "config"  # configs of a single-file checkpoint, beside it once it is patched


class NetworkConfig(TypedDict, total=False):
    """What is read of a config without the library that it belongs to."""

    _class_name: str
    model_type: str | None
    architectures: list[str] | None
    auto_map: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose configs have been read.

    Attributes:
        name: As the user gave it, for messages.
        root: The folder of its files.
        layout: Which library's layout it has.
        classes: For each component with a config, `(library, class name)`; a checkpoint that is a
            single network has one component, named `""`.
        configs: Folder of the configs (`root`, except for a single file).
        file: The file itself, when it is a single one.
        pipeline_class: Class name of a pipeline.
        manifest: The record of its patch, if it is patched.
        remote_code: Classes whose code comes with the checkpoint.
    """

    name: str
    root: Path
    layout: Layout
    classes: Mapping[str, tuple[str, str]]
    configs: Path
    file: Path | None = None
    pipeline_class: str | None = None
    manifest: Manifest | None = None
    remote_code: tuple[str, ...] = ()

    def config(self, component: str) -> dict[str, Any]:
        """The config of a component; empty for a VGGT or Pi3 that has none, the public one."""
        file = self.config_folder(component) / "config.json"
        if self.classes.get(component, ("", ""))[0] == "retrofit" and not file.is_file():
            return {}
        return read_config(file)

    def config_folder(self, component: str) -> Path:
        """Where a component's config lies."""
        return self.configs / component if component else self.configs

    def weight_folder(self, component: str) -> Path:
        """Where a component's weights lie."""
        return self.root / component if component else self.root


def identify(folder: Path, name: str) -> Checkpoint:
    """Read the configs of a folder.

    Raises:
        CheckpointError: If it holds no checkpoint of a known layout.
    """
    refuse_special_files(folder)
    manifest = Manifest.read(folder) if (folder / MANIFEST).exists() else None
    if (folder / "model_index.json").is_file():
        return _pipeline(folder, name, manifest)
    if (folder / "config.json").is_file():
        return _component(folder, name, manifest)
    if manifest is not None and manifest.single_file:
        own = identify_own_file(folder / manifest.single_file, name, manifest)
        if own is not None and not (folder / CONFIG_FOLDER).is_dir():
            return own
        configs = identify(folder / CONFIG_FOLDER, name)
        return join_configs(configs, folder / manifest.single_file, name, manifest)
    own_network = _recognise_weights(find_weights(folder))
    if own_network is not None:
        return _own_network(folder, own_network, name, manifest)
    singles = sorted(folder.glob("*.safetensors"))
    found = f"Give the file itself: {singles[0]}." if singles else "Give the folder above or below."
    raise CheckpointError(
        f"{name}: expected model_index.json or config.json in it, got neither. {found}"
    )


def refuse_special_files(folder: Path) -> None:
    """Refuse pipes and devices where a library would read a file: it would hang, or never end.

    Raises:
        InputError: With the first one's name.
    """
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_dir():
            require_regular(file, file.stat())


def read_config(file: Path) -> dict[str, Any]:
    """The config of a network, none of whose numbers is absurd.

    Raises:
        CheckpointError: If one is, or the file is missing or no JSON object.
    """
    config = read_json(file)
    check_numbers(config, file)
    problems = find_problems(config, Annotated[NetworkConfig, OTHER_KEYS])
    if problems:
        raise CheckpointError(f"{file}: {'; '.join(problems)}. Fetch the checkpoint again.")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: If the file is missing or not one.
    """
    try:
        data = parse_json(read_bytes(file, JSON_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing. Fetch the checkpoint again.") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON: {error}. Fetch it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(data).__name__}.")
    return data


def _pipeline(folder: Path, name: str, manifest: Manifest | None) -> Checkpoint:
    index = read_json(folder / "model_index.json")
    classes: dict[str, tuple[str, str]] = {}
    for component, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(entry):
            continue
        if not is_plain_name(component):
            raise CheckpointError(
                f"{name}: model_index.json lists {component!r}, which leads out of the checkpoint "
                "or to the whole of it. Fetch the checkpoint again."
            )
        if not (folder / component).is_dir():
            raise CheckpointError(
                f"{name}: model_index.json lists {component}, but its folder is missing. "
                "Fetch the checkpoint again."
            )
        refuse_special_files(folder / component)
        for file in CONFIGS:
            if (folder / component / file).is_file():
                read_config(folder / component / file)
        _require_config(folder / component, str(entry[1]), name)
        if (folder / component / "config.json").is_file():
            library = "diffusers" if entry[0] == TUNED_LIBRARY else str(entry[0])
            classes[component] = (library, str(entry[1]))
    class_name = index.get("_class_name")
    if isinstance(class_name, list):
        class_name = class_name[-1] if class_name else None
    if not isinstance(class_name, str):
        raise CheckpointError(
            f"{folder / 'model_index.json'}: _class_name: expected a text, got {class_name!r}. "
            "Fetch the checkpoint again."
        )
    return Checkpoint(
        name=name,
        root=folder,
        layout="pipeline",
        classes=classes,
        configs=folder,
        pipeline_class=class_name,
        manifest=manifest,
    )


def _require_config(folder: Path, class_name: str, name: str) -> None:
    """Check that the folder of a network has its config, and no folder is empty.

    Raises:
        CheckpointError: If it is.
    """
    needs_config = not class_name.endswith(WITHOUT_CONFIG)
    if (needs_config and not (folder / "config.json").is_file()) or not any(folder.iterdir()):
        raise CheckpointError(
            f"{name}: model_index.json lists {folder.name}, but its folder has no "
            f"{'config.json' if needs_config else 'files'}. Fetch the checkpoint again."
        )


def _component(folder: Path, name: str, manifest: Manifest | None) -> Checkpoint:
    config = read_config(folder / "config.json")
    own_network = recognise_config(config)
    if own_network is not None:
        return _own_network(folder, own_network, name, manifest)
    if "_class_name" in config:
        layout: Layout = "diffusers"
        entry = ("diffusers", str(config["_class_name"]))
    elif "model_type" in config or "architectures" in config:
        layout = "transformers"
        entry = ("transformers", str((config.get("architectures") or [""])[0]))
    elif (named := _recognise_weights(find_weights(folder))) is not None:
        return _own_network(folder, named, name, manifest)
    else:
        raise CheckpointError(
            f"{name}: its config.json names neither `_class_name` (diffusers) nor `model_type` "
            "(transformers), and is none of VGGT or Pi3. Give a checkpoint that one of them saved."
        )
    return Checkpoint(
        name=name,
        root=folder,
        layout=layout,
        classes={"": entry},
        configs=folder,
        manifest=manifest,
        remote_code=tuple(sorted(config.get("auto_map") or ())),
    )


def _own_network(folder: Path, class_name: str, name: str, manifest: Manifest | None) -> Checkpoint:
    """A folder with one of `retrofit.architectures`, whose config may be missing."""
    return Checkpoint(
        name=name,
        root=folder,
        layout="retrofit",
        classes={"": ("retrofit", class_name)},
        configs=folder,
        manifest=manifest,
    )


def identify_own_file(path: Path, name: str, manifest: Manifest | None) -> Checkpoint | None:
    """One of `retrofit.architectures` in a single file without a config, None for another."""
    class_name = _recognise_weights([path])
    if class_name is None:
        return None
    own = _own_network(path.parent, class_name, name, manifest)
    return replace(own, layout="single-file", file=path, configs=path / CONFIG_FOLDER)


def _recognise_weights(files: list[Path]) -> str | None:
    """The class of `retrofit.architectures` that the tensors of whole files belong to."""
    names = [name for file in files if file.is_file() for name in read_header(file)]
    return recognise_tensors(names)


def join_configs(
    configs: Checkpoint, file: Path, name: str, manifest: Manifest | None
) -> Checkpoint:
    """A single file with the configs that belong to it."""
    found = replace(
        configs,
        name=name,
        root=file.parent,
        layout="single-file",
        file=file,
        manifest=manifest,
    )
    if found.pipeline_class is None or holds_pipeline(file):
        return found
    component = denoising_component(list(found.classes), name)
    return replace(
        found,
        classes={"": found.classes[component]},
        configs=found.config_folder(component),
        pipeline_class=None,
    )
