"""Single `.safetensors` checkpoints in the layouts that diffusers' `from_single_file` takes.

Such a file holds no configs. diffusers knows from the tensors which public repository's configs
fit, and fetches those; a folder with them can be given instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoints.weights import read_header
from retrofit.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from retrofit.checkpoints.layouts import Checkpoint

    Converted = Mapping[str, Tensor]

# Where a whole pipeline in one file keeps what is not its denoising network.
PIPELINE_PARTS = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "vae.",
)
NETWORKS = ("unet", "transformer", "controlnet")
OPTIONAL = ("safety_checker",)  # left out of a pipeline in one file
OPEN_CLIP = (
    "cond_stage_model.model.",
    "conditioner.embedders.1.model.",
    "conditioner.embedders.0.model.",
)
CLIP = (None, "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")


def guess_config_repo(file: Path) -> str:
    """The public repository whose configs fit a file, as diffusers infers it from the tensors.

    Raises:
        CheckpointError: If the file is corrupt.
    """
    import torch

    utils: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    shapes = {
        name: torch.empty(info.shape, device="meta") for name, info in read_header(file).items()
    }
    return str(utils.fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def holds_pipeline(file: Path) -> bool:
    """Whether a file has more in it than one network: a VAE or text encoders."""
    names = read_header(file)
    return any(name.startswith(part) for name in names for part in PIPELINE_PARTS)


def denoising_component(components: list[str], name: str) -> str:
    """The component that a file with one network stands for.

    Raises:
        CheckpointError: If the configs list none.
    """
    for component in NETWORKS:
        if component in components:
            return component
    raise CheckpointError(
        f"{name}: its configs list {', '.join(components) or 'nothing'}, none of "
        f"{', '.join(NETWORKS)}. Give the configs of a pipeline or network with `--config`."
    )


def convert(
    checkpoint: Checkpoint, component: str, network: nn.Module, tensors: dict[str, Tensor]
) -> Converted:
    """A file's tensors under a network's names, by the conversion that diffusers itself runs.

    Args:
        checkpoint: The single file with its configs.
        component: The network's name.
        network: Built without weights.
        tensors: All of the file, which may be without numbers.

    Raises:
        CheckpointError: If diffusers opens no such network from a file.
    """
    if checkpoint.classes[component][0] == "transformers":
        found = max(_text_encoders(network, tensors), key=lambda names: _fits(names, network))
        return found if _fits(found, network) else {}
    module: Any = importlib.import_module("diffusers.loaders.single_file_model")
    if not module._should_convert_state_dict_to_diffusers(network.state_dict(), tensors):
        return tensors
    kind = module._get_single_file_loadable_mapping_class(type(network))
    if kind is None:
        raise CheckpointError(
            f"{checkpoint.name}: diffusers opens no {type(network).__name__} from a single file. "
            "Give the folder that it was saved in."
        )
    mapping: Callable[..., Converted] = module.SINGLE_FILE_LOADABLE_CLASSES[kind][
        "checkpoint_mapping_fn"
    ]
    config = type(network).load_config(str(checkpoint.config_folder(component)))  # type: ignore[attr-defined]
    return mapping(config=config, checkpoint=dict(tensors))


def _text_encoders(network: nn.Module, tensors: Converted) -> Iterator[Converted]:
    """What each of diffusers' conversions of text encoders makes of a file."""
    utils: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    wrapped = hasattr(network, "text_model")
    made = [utils.convert_ldm_clip_checkpoint(dict(tensors), prefix) for prefix in CLIP]
    made += [
        utils.convert_open_clip_checkpoint(network, dict(tensors), prefix=p) for p in OPEN_CLIP
    ]
    made.append(utils.convert_sd3_t5_checkpoint_to_diffusers(dict(tensors)))
    for names in made:
        yield names if wrapped else {k.removeprefix("text_model."): v for k, v in names.items()}


def _fits(names: Converted, network: nn.Module) -> int:
    """How many of a network's tensors are there, in their shapes."""
    expected = network.state_dict()
    return sum(k in expected and v.shape == expected[k].shape for k, v in names.items())
