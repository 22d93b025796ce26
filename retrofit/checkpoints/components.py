"""One network of a checkpoint: built from its config, or loaded with its weights."""

from __future__ import annotations

from typing import Any

from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.layouts import TUNED_TYPE
from retrofit.checkpoints.libraries import (
    class_of,
    dtype_argument,
    failing_as_checkpoint_error,
    torch_dtype,
)
from retrofit.checkpoints.warned import collecting_warnings
from retrofit.checkpoints.weights import Weights
from retrofit.runtime.errors import CheckpointError


def build_component(checkpoint: Checkpoint, component: str, trust_remote_code: bool) -> Any:
    """Without weights, on the device that is the default."""
    cls = class_of(checkpoint, component)
    folder = str(checkpoint.config_folder(component))
    with failing_as_checkpoint_error(checkpoint):
        if checkpoint.classes[component][0] == "retrofit":
            return cls.from_config(checkpoint.config(component), strict=False).eval()
        if checkpoint.classes[component][0] == "diffusers":
            return cls.from_config(cls.load_config(folder)).eval()
        from transformers import AutoModel

        config = _transformers_config(checkpoint, component, trust_remote_code)
        if cls is AutoModel:
            model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = cls._from_config(config)
        return model.eval()


def load_component(
    checkpoint: Checkpoint,
    component: str,
    weights: Weights,
    dtype: str | None,
    trust_remote_code: bool,
) -> Any:
    """With its weights, on the CPU; None keeps their dtype."""
    cls = class_of(checkpoint, component)
    as_dtype = torch_dtype(dtype or weights.dtype)
    if checkpoint.classes[component][0] == "retrofit":
        return cls.from_pretrained(
            checkpoint.file or checkpoint.weight_folder(component),
            config=checkpoint.config(component),
            dtype=None if dtype is None else as_dtype,
        )
    with failing_as_checkpoint_error(checkpoint), collecting_warnings():
        if checkpoint.file is not None:
            single = {
                "config": str(checkpoint.config_folder(component)),
                dtype_argument(): as_dtype,
            }
            return cls.from_single_file(str(checkpoint.file), **single).eval()
        options: dict[str, Any] = {"variant": weights.variant, "use_safetensors": True}
        if checkpoint.classes[component][0] == "diffusers":
            options[dtype_argument()] = as_dtype
        else:
            config = _transformers_config(checkpoint, component, trust_remote_code)
            options |= {"config": config, "dtype": as_dtype, "trust_remote_code": trust_remote_code}
        model, info = cls.from_pretrained(
            str(checkpoint.weight_folder(component)), output_loading_info=True, **options
        )
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise CheckpointError(
            f"{checkpoint.name}: its weights lack {len(missing)} tensors that its config asks for "
            f"({', '.join(missing[:3])}). Fetch the checkpoint again."
        )
    return model.eval()


def _transformers_config(checkpoint: Checkpoint, component: str, trust_remote_code: bool) -> Any:
    """The config of a component of transformers, also where a fine-tune marked its type."""
    from transformers import AutoConfig

    folder = str(checkpoint.config_folder(component))
    config = checkpoint.config(component)
    model_type = str(config.get("model_type") or "")
    if model_type.startswith(TUNED_TYPE):
        rest = {name: value for name, value in config.items() if name != "model_type"}
        return AutoConfig.for_model(model_type.removeprefix(TUNED_TYPE), **rest)
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
