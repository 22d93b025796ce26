"""Single `.safetensors` checkpoints in the layouts that diffusers' `from_single_file` takes.

Such a file holds no configs. diffusers knows from the tensors which public repository's configs
fit, and fetches those; a folder with them can be given instead.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from retrofit.checkpoints.weights import read_header
from retrofit.runtime.errors import CheckpointError

# Where a whole pipeline in one file keeps what is not its denoising network.
PIPELINE_PARTS = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "vae.",
)
NETWORKS = ("unet", "transformer", "controlnet")


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
