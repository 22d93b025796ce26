"""Sizes of a VGGT and of its parts, from the nested or the hub's flat form of a config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from retrofit.architectures.dino_config import PRESETS, DinoConfig
from retrofit.architectures.head_outputs import CONFIDENCE_ACTIVATIONS, VALUE_ACTIVATIONS
from retrofit.architectures.sections import (
    Section,
    among,
    divisible,
    positive,
    raise_problems,
    read_section,
)

logger = logging.getLogger(__name__)

HEADS = ("camera_head", "point_head", "depth_head")
_FLAT_KEYS = {
    "img_size",
    "patch_size",
    "embed_dim",
    "enable_camera",
    "enable_point",
    "enable_depth",
    "enable_track",
}
_NESTED_KEYS = ("aggregator", "dino", *HEADS)


@dataclass(frozen=True, kw_only=True)
class AggregatorConfig(Section):
    """The alternating frame and global blocks; the defaults are VGGT-1B's."""

    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4
    patch_embed: str = "dinov2_vitl14_reg"
    aa_order: tuple[str, ...] = ("frame", "global")
    aa_block_size: int = 1
    qk_norm: bool = True
    rope_freq: float = 100.0
    init_values: float | None = field(default=0.01, metadata={"optional": True})

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        found = positive(
            self, "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"
        )
        found += positive(self, "num_register_tokens", "aa_block_size", "rope_freq")
        if found:
            return found
        found += divisible(self.embed_dim, 4 * self.num_heads, "embed_dim (of num_heads x 4)")
        found += divisible(self.depth, self.aa_block_size, "depth (of aa_block_size)")
        if sorted(self.aa_order) != ["frame", "global"]:
            found.append(f"aa_order: expected frame and global, got {list(self.aa_order)}.")
        if "conv" not in self.patch_embed:
            found += among(self.patch_embed, ("conv", *PRESETS), "patch_embed")
        return found


@dataclass(frozen=True, kw_only=True)
class CameraHeadConfig(Section):
    """The iterative camera head."""

    dim_in: int = 2048
    trunk_depth: int = 4
    num_heads: int = 16
    mlp_ratio: float = 4.0
    init_values: float | None = field(default=0.01, metadata={"optional": True})

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        found = positive(self, "dim_in", "trunk_depth", "num_heads", "mlp_ratio")
        return found or divisible(self.dim_in, self.num_heads, "dim_in (of num_heads)")


@dataclass(frozen=True, kw_only=True)
class DPTHeadConfig(Section):
    """A dense head over four layers of the aggregator."""

    output_dim: int = 4
    activation: str = "inv_log"
    conf_activation: str = "expp1"
    dim_in: int = 2048
    patch_size: int = 14
    features: int = 256
    out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    intermediate_layer_idx: tuple[int, ...] = (4, 11, 17, 23)
    pos_embed: bool = True

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        found = positive(self, "dim_in", "patch_size", "features")
        found += among(self.activation, VALUE_ACTIVATIONS, "activation")
        found += among(self.conf_activation, CONFIDENCE_ACTIVATIONS, "conf_activation")
        if self.output_dim < 2:
            found.append(f"output_dim: expected 2 or more, got {self.output_dim}.")
        if self.activation == "xy_inv_log" and self.output_dim != 4:
            found.append(f"output_dim: expected 4 for xy_inv_log, got {self.output_dim}.")
        for name in ("out_channels", "intermediate_layer_idx"):
            if len(getattr(self, name)) != 4:
                found.append(f"{name}: expected 4 numbers, got {list(getattr(self, name))}.")
        if self.pos_embed:
            found += divisible(self.features, 8, "features")
            for channels in self.out_channels:
                found += divisible(channels, 4, "out_channels")
        return found


@dataclass(frozen=True, kw_only=True)
class VGGTConfig:
    """A whole VGGT; a head that is None does not exist.

    Attributes:
        aggregator: The frame and global blocks.
        dino: The DINOv2 patch embedding, None for a plain convolution.
        camera_head: The camera head.
        point_head: The head of world points.
        depth_head: The head of depth.
    """

    aggregator: AggregatorConfig = AggregatorConfig()
    dino: DinoConfig | None = DinoConfig()
    camera_head: CameraHeadConfig | None = CameraHeadConfig()
    point_head: DPTHeadConfig | None = DPTHeadConfig()
    depth_head: DPTHeadConfig | None = DPTHeadConfig(output_dim=2, activation="exp")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, strict: bool = True) -> VGGTConfig:
        """Read either form of a config.

        The flat form is the hub's (`img_size`, `patch_size`, `embed_dim`, `enable_camera`,
        `enable_point`, `enable_depth`, `enable_track`; what is missing is VGGT-1B's). The nested
        form has a mapping per part: `aggregator`, `dino`, `camera_head`, `point_head`,
        `depth_head`; a part that is missing does not exist.

        Args:
            values: The config.
            strict: Refuse unknown settings of the flat form, which the hub's own loader ignores.

        Raises:
            ConfigError: If anything is wrong; the message lists everything.
        """
        problems: list[str] = []
        values = {key: value for key, value in values.items() if key != "model_type"}
        if any(key in values for key in _NESTED_KEYS):
            config = _read_nested(values, problems)
        else:
            config = _read_flat(values, problems, strict)
        raise_problems("VGGT", problems or _mismatches(config))
        return config

    def to_dict(self) -> dict[str, Any]:
        """The nested form, ready for `config.json`."""
        parts = {name: getattr(self, name) for name in _NESTED_KEYS}
        return {"model_type": "vggt"} | {
            name: asdict(part) for name, part in parts.items() if part is not None
        }

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """Layers of the aggregator that a head reads, ascending."""
        layers = {self.aggregator.depth - 1} if self.camera_head else set()
        for head in (self.point_head, self.depth_head):
            layers |= set(head.intermediate_layer_idx) if head else set()
        return tuple(sorted(layers)) or (self.aggregator.depth - 1,)


def _read_nested(values: Mapping[str, Any], problems: list[str]) -> VGGTConfig:
    for key in values:
        if key not in _NESTED_KEYS:
            problems.append(f"unknown part {key!r}: expected {', '.join(_NESTED_KEYS)}.")
    given = {name: values[name] for name in _NESTED_KEYS if values.get(name) is not None}
    aggregator = read_section(AggregatorConfig, given.get("aggregator", {}), "aggregator", problems)
    width = 2 * aggregator.embed_dim
    parts: dict[str, Any] = {"aggregator": aggregator, "dino": _dino_preset(aggregator)}
    if "dino" in given:
        parts["dino"] = read_section(DinoConfig, given["dino"], "dino", problems)
    for name in HEADS:
        section = CameraHeadConfig if name == "camera_head" else DPTHeadConfig
        defaults: dict[str, Any] = {"dim_in": width}
        if section is DPTHeadConfig:
            defaults["patch_size"] = aggregator.patch_size
        if name == "depth_head":
            defaults |= {"output_dim": 2, "activation": "exp"}
        parts[name] = (
            read_section(section, given[name], name, problems, **defaults)
            if name in given
            else None
        )
    return VGGTConfig(**parts)


def _read_flat(values: Mapping[str, Any], problems: list[str], strict: bool) -> VGGTConfig:
    unknown = sorted(set(values) - _FLAT_KEYS)
    if unknown and strict:
        problems.append(f"unknown settings {unknown}: expected some of {sorted(_FLAT_KEYS)}.")
    elif unknown:
        logger.warning("VGGT config: settings not known and not used: %s", ", ".join(unknown))
    sizes = {key: values[key] for key in ("img_size", "patch_size", "embed_dim") if key in values}
    aggregator = read_section(AggregatorConfig, sizes, "aggregator", problems)
    width, patch_size = 2 * aggregator.embed_dim, aggregator.patch_size
    points = DPTHeadConfig(dim_in=width, patch_size=patch_size)
    depth = replace(points, output_dim=2, activation="exp")
    enabled = {name: values.get(f"enable_{name.split('_')[0]}", True) for name in HEADS}
    return VGGTConfig(
        aggregator=aggregator,
        dino=_dino_preset(aggregator),
        camera_head=CameraHeadConfig(dim_in=width) if enabled["camera_head"] else None,
        point_head=points if enabled["point_head"] else None,
        depth_head=depth if enabled["depth_head"] else None,
    )


def _dino_preset(aggregator: AggregatorConfig) -> DinoConfig | None:
    if aggregator.patch_embed not in PRESETS:
        return None
    return replace(
        PRESETS[aggregator.patch_embed],
        img_size=aggregator.img_size,
        patch_size=aggregator.patch_size,
        num_register_tokens=aggregator.num_register_tokens,
    )


def _mismatches(config: VGGTConfig) -> list[str]:
    """Widths that have to agree between parts."""
    aggregator, found = config.aggregator, []
    expected = [
        ("dino", "embed_dim", aggregator.embed_dim),
        ("dino", "patch_size", aggregator.patch_size),
        *((head, "dim_in", 2 * aggregator.embed_dim) for head in HEADS),
        *((head, "patch_size", aggregator.patch_size) for head in HEADS[1:]),
    ]
    for part, name, value in expected:
        section = getattr(config, part)
        if section is not None and getattr(section, name) != value:
            got = getattr(section, name)
            found.append(f"{part}.{name}: expected {value} to fit the aggregator, got {got}.")
    for part in HEADS[1:]:
        section = getattr(config, part)
        for layer in section.intermediate_layer_idx if section else ():
            if not 0 <= layer < aggregator.depth:
                found.append(
                    f"{part}.intermediate_layer_idx: expected layers below the depth"
                    f" {aggregator.depth}, got {layer}."
                )
    return found
