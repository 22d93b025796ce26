"""What a network offers to methods: its attention sites, its levels and who knows its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from retrofit.layout.grid import TokenGrid

LEARNED = "_retrofit"  # a patch's own submodule in an attention module: its learned parts

GridReader = Callable[[Any, tuple[Any, ...], dict[str, Any]], TokenGrid]
"""Reads the grid of a module's inner sites from the arguments of its forward.

Called as `reader(module, args, kwargs)` inside traced code: plain arithmetic on shapes only. It is
a function of a module (not a closure), so that a patched model can be copied and pickled.
"""
GridRecaller = Callable[[Any, tuple[Any, ...], dict[str, Any], Mapping[int, TokenGrid]], TokenGrid]


@dataclass(frozen=True)
class ValueReader:
    """A reader that must look at values (position ids), which traced code can't do.

    Attributes:
        read: Reads and checks the grid, outside traced code.
        recall: The grid inside traced code, found from shapes and from the grids read so far, which
            it gets by their number of tokens without the prefix. It leaves a check in the graph.
    """

    read: GridReader
    recall: GridRecaller

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
        """Read outside traced code."""
        return self.read(module, args, kwargs)


@dataclass(frozen=True)
class LayoutReader:
    """Where a layout of tokens is read, and how.

    Attributes:
        module: Path of the nearest module around its sites that sees height and width; `""` is the
            network itself. Several layouts may be read at one module.
        read: How to read the grid from the arguments of that module's forward.
    """

    module: str
    read: GridReader | ValueReader


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention call that can be replaced.

    Attributes:
        path: Module path inside its network, as in `named_modules()`.
        index: Place in the order of execution among the sites of the same kind.
        block: Index of the transformer block that holds it.
        kind: `self`, `cross` (keys from elsewhere) or `joint` (text and picture in one sequence).
        num_heads: Query heads.
        head_dim: Channels of a head.
        scope: `global` when every token of the input sees every other; `frame` when only within its
            own frame, frames standing in the batch.
        level: Index into `Network.levels`, for networks whose resolution changes inside.
        layout: Which of `Network.readers` reads its grid; None when the tokens are a plain
            sequence, whose grid is their number.
        num_calls: Attention calls in one forward; all but the last run dense (Wan image-to-video
            attends to the image first, then to the text).
        is_causal: Whether a token sees no later one; a mask of such a site is no padding alone.
        network: Name of the network it stands in (`unet`), filled in when a patch is installed.
    """

    path: str
    index: int
    block: int
    kind: Literal["self", "cross", "joint"]
    num_heads: int
    head_dim: int
    scope: Literal["global", "frame"] = "global"
    level: int | None = None
    layout: str | None = None
    num_calls: int = 1
    is_causal: bool = False
    network: str = ""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of a UNet.

    Attributes:
        index: 0 is the resolution of the latent.
        scale: The latent's size divided by this level's.
        has_attention: Whether any of its pairs ends in attention.
        down_pairs: Path of the module that ends each (resnet, attention) pair on the way down.
        up_pairs: The same on the way up, deepest first; empty in a ControlNet.
        downsampler: Path of the module that leads to the next level, if there is one.
        upsampler: Path of the module that leads back from the next level to this one.
    """

    index: int
    scale: int
    has_attention: bool
    down_pairs: tuple[str, ...]
    up_pairs: tuple[str, ...] = ()
    downsampler: str | None = None
    upsampler: str | None = None


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a family found in one network; methods see this and never the family.

    Attributes:
        family: Name of the family that recognised it.
        sites: Every attention site, in order of execution.
        levels: Its resolutions, for a UNet.
        readers: For each `AttentionSite.layout`, where and how its grid is read.
        has_frames: Whether the frames of its grids follow one another in time, as a video's do.
            Views of a scene, which may come in any order, do not.
        sample_size: Height and width, in latents or else pixels, that it was trained at, where the
            config says.
        unreachable: Attention modules that never reach the interception point, with the reason.
        name: The network's name in its pipeline (`unet`), filled in when a patch is installed.
    """

    family: str
    sites: tuple[AttentionSite, ...]
    levels: tuple[Level, ...] = ()
    readers: Mapping[str, LayoutReader] = field(default_factory=dict)
    has_frames: bool = False
    sample_size: tuple[int, int] | None = None
    unreachable: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def named(self, name: str) -> Network:
        """The same network, with its sites, under a name."""
        sites = tuple(replace(site, network=name) for site in self.sites)
        return replace(self, name=name, sites=sites)


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """The argument of a forward, whether it came by position or by name.

    Raises:
        TypeError: If it did not come at all, as Python says of any call.
    """
    if len(args) > position:
        return args[position]
    if name not in kwargs:
        raise TypeError(f"forward() missing 1 required positional argument: {name!r}")
    return kwargs[name]
