"""Sizes of a Pi3 and of its parts, from the nested or the hub's form of a config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from retrofit.architectures.dino_config import DinoConfig
from retrofit.architectures.sections import (
    Section,
    divisible,
    positive,
    raise_problems,
    read_section,
)

# Width, heads and blocks of the decoder by the hub's `decoder_size`.
DECODER_SIZES = {"small": (384, 6, 24), "base": (768, 12, 24), "large": (1024, 16, 36)}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pi3HeadConfig(Section):
    """The transformer of each of the three heads; the camera's ends in `cam_dim`."""

    dim: int = 1024
    heads: int = 16
    depth: int = 5
    cam_dim: int = 512

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        found = positive(self, "dim", "heads", "depth", "cam_dim")
        return found or divisible(self.dim, 4 * self.heads, "dim (of heads x 4)")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Section):
    """The alternating decoder; the defaults are the public checkpoint's."""

    dec_embed_dim: int = 1024
    dec_num_heads: int = 16
    dec_depth: int = 36
    num_register_tokens: int = 5
    pos_type: str = "rope100"

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies: the number in `pos_type`."""
        return float(self.pos_type.removeprefix("rope"))

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        names = ("dec_embed_dim", "dec_num_heads", "dec_depth", "num_register_tokens")
        found = positive(self, *names)
        try:
            if self.rope_base <= 0:
                raise ValueError
        except ValueError:
            found.append(f"pos_type: expected rope and a number, as rope100, got {self.pos_type}.")
        if self.dec_depth < 2 or self.dec_depth % 2:
            found.append(f"dec_depth: expected an even number, got {self.dec_depth}.")
        if found:
            return found
        return divisible(self.dec_embed_dim, 4 * self.dec_num_heads, "dec_embed_dim (of heads x 4)")


@dataclass(frozen=True, kw_only=True)
class Pi3Config:
    """A whole Pi3.

    Attributes:
        encoder: The DINOv2 patch embedding.
        decoder: The blocks that alternate between a frame and all frames.
        head: The transformers in front of the point, confidence and camera heads.
    """

    encoder: DinoConfig = DinoConfig()
    decoder: DecoderConfig = DecoderConfig()
    head: Pi3HeadConfig = Pi3HeadConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, strict: bool = True) -> Pi3Config:
        """Read either form of a config.

        The hub's form is `decoder_size` (small, base, large) and `pos_type`. The nested form is
        `encoder`, `head` (mappings), `dec_embed_dim`, `dec_num_heads`, `dec_depth`, `pos_type`,
        `num_register_tokens`. What is missing is the public checkpoint's.

        Args:
            values: The config.
            strict: Refuse unknown settings, which the hub's own loader ignores.

        Raises:
            ConfigError: If anything is wrong; the message lists everything.
        """
        problems: list[str] = []
        rest = {key: value for key, value in values.items() if key != "model_type"}
        encoder = read_section(DinoConfig, rest.pop("encoder", {}), "encoder", problems)
        head = read_section(Pi3HeadConfig, rest.pop("head", {}), "head", problems)
        size = rest.pop("decoder_size", "large")
        if size not in DECODER_SIZES:
            problems.append(f"decoder_size: expected small, base or large, got {size!r}.")
            size = "large"
        preset = dict(
            zip(("dec_embed_dim", "dec_num_heads", "dec_depth"), DECODER_SIZES[size], strict=True)
        )
        if rest.get("pos_type", "") is None:
            del rest["pos_type"]
        if not strict:
            rest = _drop_unknown(rest)
        decoder = read_section(DecoderConfig, rest, "decoder", problems, **preset)
        if encoder.embed_dim != decoder.dec_embed_dim:
            problems.append(
                f"encoder.embed_dim: expected {decoder.dec_embed_dim}, the decoder's width, got"
                f" {encoder.embed_dim}."
            )
        raise_problems("Pi3", problems)
        return cls(encoder=encoder, decoder=decoder, head=head)

    def to_dict(self) -> dict[str, Any]:
        """The nested form, ready for `config.json`."""
        sections = {"encoder": asdict(self.encoder), "head": asdict(self.head)}
        return {"model_type": "pi3"} | sections | asdict(self.decoder)


def _drop_unknown(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(DecoderConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        logger.warning("Pi3 config: settings not known and not used: %s", ", ".join(unknown))
    return {name: value for name, value in values.items() if name in known}
