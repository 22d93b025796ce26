"""Tell this package's networks apart by a config or by tensor names; imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

NETWORKS = {"VGGT": "retrofit.architectures.vggt", "Pi3": "retrofit.architectures.pi3"}
TRACK_HEAD = "track_head"

_CONFIG_KEYS = {
    "VGGT": (
        {"aggregator"},
        {"img_size", "patch_size", "embed_dim"},
        {"enable_camera"},
        {"enable_point"},
        {"enable_depth"},
        {"enable_track"},
    ),
    "Pi3": ({"decoder_size"}, {"dec_embed_dim", "dec_depth"}, {"encoder", "pos_type"}),
}
_TENSORS = {
    "VGGT": ("aggregator.frame_blocks.", "aggregator.global_blocks.", "aggregator.camera_token"),
    "Pi3": ("register_token", "decoder.", "point_decoder.", "camera_decoder."),
}


def recognise_config(config: Mapping[str, Any]) -> str | None:
    """The class whose config this is, None for another library's.

    `save_pretrained` of this package writes a `model_type`; the configs on the hub are the bare
    arguments of the original's constructor.
    """
    said = str(config.get("model_type") or "").lower()
    foreign = "_class_name" in config or "architectures" in config
    for name, alternatives in _CONFIG_KEYS.items():
        fits = any(keys <= set(config) for keys in alternatives)
        if fits and not foreign and said in ("", name.lower()):
            return name
    return None


def recognise_tensors(names: Collection[str]) -> str | None:
    """The class whose checkpoint has tensors of these names, None for another."""
    for name, prefixes in _TENSORS.items():
        if all(any(tensor.startswith(prefix) for tensor in names) for prefix in prefixes):
            return name
    return None


def network_class(name: str) -> Any:
    """The class itself, a `VGGT` or `Pi3`."""
    return getattr(importlib.import_module(NETWORKS[name]), name)


def is_read_past(name: str, config: Mapping[str, Any], tensor: str) -> bool:
    """Whether a checkpoint's tensor is one that the network has no part for.

    Args:
        name: `VGGT` or `Pi3`.
        config: The checkpoint's.
        tensor: Its name.
    """
    if name != "VGGT":
        return False
    part = tensor.split(".")[0]
    absent = [head for head in ("camera", "point", "depth") if not _has_head(config, head)]
    return part in (TRACK_HEAD, *(f"{head}_head" for head in absent))


def _has_head(config: Mapping[str, Any], head: str) -> bool:
    """As `VGGTConfig.from_dict` reads the nested and the flat form."""
    nested = any(key in config for key in ("aggregator", "dino", f"{head}_head"))
    return config.get(f"{head}_head") is not None if nested else config.get(f"enable_{head}", True)
