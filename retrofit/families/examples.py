"""Example inputs: what a family needs to run one of its networks without any data.

Used to count work on the meta device and to prove a patch; never to judge quality.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retrofit.runtime.errors import UnsupportedError

TEXT_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
POSITION_TABLES = ("position_embeddings", "position_embedding")


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """Size of an input in the units of the network: latents behind an autoencoder, else pixels.

    Attributes:
        height: Rows.
        width: Columns.
        frames: Frames of a video, views of a scene.
        tokens: Length of a text.
    """

    height: int = 1
    width: int = 1
    frames: int = 1
    tokens: int = 0

    def __str__(self) -> str:
        """`512 tokens`, `64x64` or `5x32x32`."""
        if self.tokens:
            return f"{self.tokens} tokens"
        size = f"{self.height}x{self.width}"
        return size if self.frames == 1 else f"{self.frames}x{size}"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """How to make inputs for a network of a family.

    Attributes:
        axes: What a user may choose: `tokens`, or `size`, or `size` and `frames`.
        native: The size that the network was trained at, as its config says.
        probes: Small sizes, smallest first, of which one is large enough for most methods.
        make: Keyword arguments of the forward, batch 1, float32, drawn from the generator.
        files: What a comparison makes inputs of; empty where they can only be drawn.
        least: The smallest size that gives a token.
        latent_scale: Frames and pixels that one latent frame and one latent stand for, where the
            checkpoint's autoencoder does not say.
        first_timestep: Of a schedule, in the network's unit.
        packed: Latents along a side that pipelines pack into one token.
    """

    axes: tuple[Literal["tokens", "size", "frames"], ...]
    native: Callable[[Any], InputSize]
    probes: Callable[[Any], tuple[InputSize, ...]]
    make: Callable[[Any, InputSize, torch.Generator], dict[str, Any]]
    files: Literal["texts", "pictures", "scenes", ""] = ""
    least: Callable[[Any], InputSize] = lambda module: InputSize(height=1, width=1)
    latent_scale: tuple[int, int] = (1, 1)
    packed: int = 1
    first_timestep: float = 999

    def shapes(self, module: Any, size: InputSize) -> dict[str, Any]:
        """What `make` gives, with what it draws on the meta device: no memory at any size."""
        with _DrawNothing():
            return self.make(module, size, torch.Generator())


class _DrawNothing(TorchFunctionMode):
    """Random tensors without numbers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn, torch.randint):
            kwargs.pop("generator", None)
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Seeded standard normal numbers."""
    return torch.randn(shape, generator=generator)


def _text_limit(module: Any) -> int:
    """Tokens that the position table holds, padding's own positions left out."""
    config = module.config
    length = getattr(config, "max_position_embeddings", None) or TEXT_LENGTHS[-1]
    tables = (part for name, part in module.named_modules() if name.endswith(POSITION_TABLES))
    padding = getattr(next(tables, None), "padding_idx", None)
    return int(length) if padding is None else int(length) - padding - 1


def _text_sizes(module: Any) -> tuple[InputSize, ...]:
    limit = _text_limit(module)
    lengths = [length for length in TEXT_LENGTHS if length < limit] + [limit]
    return tuple(InputSize(tokens=length) for length in lengths if length <= TEXT_LENGTHS[-1])


def _make_text(module: Any, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    limit = _text_limit(module)
    if size.tokens > limit:
        raise UnsupportedError(
            f"{type(module).__name__}: expected at most {limit} tokens, got {size.tokens}. "
            "Its position table is no longer."
        )
    first = min(1000, module.config.vocab_size // 2)  # past the special ones
    ids = torch.randint(first, module.config.vocab_size, (1, size.tokens), generator=generator)
    return {"input_ids": ids}


TEXT = Examples(
    axes=("tokens",),
    native=lambda module: InputSize(tokens=min(_text_limit(module), 512)),
    probes=_text_sizes,
    files="texts",
    make=_make_text,
)


def _picture_size(module: Any) -> InputSize:
    size = getattr(module.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return InputSize(height=int(height), width=int(width))


def _make_pictures(module: Any, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    channels = getattr(module.config, "num_channels", 3)
    pixels = normal((1, channels, size.height, size.width), generator)
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if size != _picture_size(module) and _accepts(module, "interpolate_pos_encoding"):
        inputs["interpolate_pos_encoding"] = True
    return inputs


def _picture_probes(module: Any) -> tuple[InputSize, ...]:
    native = _picture_size(module)
    return native, InputSize(height=2 * native.height, width=2 * native.width)


def _one_patch(module: Any) -> InputSize:
    patch = getattr(module.config, "patch_size", 1)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return InputSize(height=int(height), width=int(width))


PICTURES = Examples(
    axes=("size",),
    native=_picture_size,
    probes=_picture_probes,
    make=_make_pictures,
    files="pictures",
    least=_one_patch,
)


def _patch(module: Any) -> int:
    config = getattr(module, "config", None)
    encoder = getattr(config, "encoder", config)
    patch: Any = getattr(module, "patch_size", None) or getattr(encoder, "patch_size", 14)
    return int(patch)


def _view_probes(module: Any) -> tuple[InputSize, ...]:
    side = _patch(module)
    return tuple(
        InputSize(frames=frames, height=rows * side, width=rows * side)
        for frames, rows in ((2, 4), (2, 8), (3, 12), (4, 16))
    )


def _make_views(module: Any, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    name = "images" if _accepts(module, "images") else "imgs"
    return {name: torch.rand((1, size.frames, 3, size.height, size.width), generator=generator)}


VIEWS = Examples(
    axes=("size", "frames"),
    native=lambda module: InputSize(
        frames=2, height=37 * _patch(module), width=37 * _patch(module)
    ),
    probes=_view_probes,
    make=_make_views,
    files="scenes",
)


def _accepts(module: Any, name: str) -> bool:
    return name in inspect.signature(type(module).forward).parameters
