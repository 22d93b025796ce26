"""The LoRA adapter of a fine-tuned checkpoint, in peft's format, beside the source's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrofit.checkpoints import read_json
from retrofit.checkpoints.manifest import RESTORE
from retrofit.patching.networks import find_networks
from retrofit.runtime.errors import CheckpointError, UnsupportedError

ADAPTER_FOLDER = "adapter"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
ADAPTER_FILES = {f"{ADAPTER_FOLDER}/{name}" for name in (CONFIG, TENSORS)}
NAME = "retrofit"
PEFT_PREFIX = "base_model.model."


def add_adapter(target: Any, components: Sequence[str], folder: Path) -> None:
    """Put the adapter of a folder into its network, if there is one.

    Args:
        target: The unpatched model or pipeline, changed in place.
        components: Of the recipe.
        folder: The checkpoint.

    Raises:
        UnsupportedError: If peft is missing.
        CheckpointError: If the adapter does not fit.
    """
    place = folder / ADAPTER_FOLDER
    if not place.is_dir():
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError as error:
        raise UnsupportedError(
            f"{folder}: its adapter needs peft, which is not installed: pip install peft"
        ) from error
    from safetensors.torch import load_file

    known = LoraConfig.__dataclass_fields__
    settings = read_json(place / CONFIG)
    config = LoraConfig(**{name: value for name, value in settings.items() if name in known})
    network = find_networks(target, tuple(components))[0].module
    before = next(network.parameters())
    inject_adapter_in_model(config, network, adapter_name=NAME)
    tensors = {
        name.removeprefix(PEFT_PREFIX): value.to(before.device)
        for name, value in load_file(place / TENSORS).items()
    }
    found = set_peft_model_state_dict(network, tensors, adapter_name=NAME)
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"{place}: does not fit the network ({len(missing)} tensors missing, "
            f"{len(found.unexpected_keys)} unknown). {RESTORE}"
        )
    network.requires_grad_(False)
