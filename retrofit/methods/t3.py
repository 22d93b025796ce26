"""T3: contiguous and strided boxes of a video in turn, another cut of the grid at every block.

Paper: https://arxiv.org/abs/2512.13492 (transform trained transformer). Departures: a grid that the
cut does not divide has short last boxes; where both kinds of box hold the same tokens, one is
computed; without a given cycle the cut is planned from the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from retrofit.kernels.grid_window import branches_coincide
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import Size, covers, plain_shape
from retrofit.patterns import AttentionCall, Dense, Mean, Pattern, Windows

# Shapes of the planned boxes after the first: frames, as a fraction of all; area, in units of the
# square root of a frame's tokens; height over width. They give the published cycle of the 4K grid
# 21 x 136 x 240, and at 480p to 1080p the published cost within a tenth.
PLANNED = ((1.0, 0.31, 1.0), (1.0, 0.7, 3.0), (1 / 3, 1.4, 1 / 3), (1 / 7, 3.8, 1 / 2))
NEAR = 1.5


@dataclass(frozen=True, kw_only=True)
class T3Config(Method):
    """Settings of T3.

    Attributes:
        cycle: How many boxes frames, height and width are cut into, for one block after the other
            and then again from the start. None plans five cuts for the grid of each call: frames
            one by one, all frames in small boxes of two shapes, and boxes short in time.
    """

    name: ClassVar[str] = "t3"
    summary: ClassVar[str] = "near and far boxes of a video, cut differently at every block"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.13492"
    helps: ClassVar[str] = (
        "at videos of 1080p and more, and after a short fine-tune; without one it mostly harms"
    )
    acts_with: ClassVar[str] = "a cycle of more boxes"
    lossy: ClassVar[str] = "lossy: without a short fine-tune the output is noise"

    cycle: tuple[Size, ...] | None = None

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        if self.cycle is None:
            return []
        problems = [
            f"cycle[{i}]: expected 1 or more boxes an axis, got {counts}."
            for i, counts in enumerate(self.cycle)
            if min(counts) < 1
        ]
        if not self.cycle:
            problems.append("cycle: expected at least one cut, got none. Leave it out to plan one.")
        return problems

    def refuses(self, network: Network) -> str | None:
        """Needs self-attention over a grid: of a video's frames, where the cut is planned."""
        if not network.has_frames and self.cycle is None:
            return (
                "it is for videos: it needs frames that follow one another in time; for pictures "
                "give it a cycle"
            )
        if any(site.kind == "self" and site.layout is not None for site in network.sites):
            return None
        return "it needs self-attention over a grid of known height and width"

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """The boxes of this site's place in the cycle."""
        call.refuse_causal("t3")
        if self.cycle is None:
            counts = plan_counts(layout.shape, site.index)
        else:
            counts = self.cycle[site.index % len(self.cycle)]
        return boxes(layout, counts)


def boxes(layout: TokenGrid, counts: Size) -> Pattern:
    """Contiguous boxes and strided ones of the same number, `counts` of them on each axis.

    One of the two where both hold the same tokens.
    """
    frames, height, width = (
        -(-length // min(count, length)) for length, count in zip(layout.shape, counts, strict=True)
    )
    size = (frames, height, width)
    if covers(layout.shape, size):
        return Dense(layout)
    near = Windows(layout=layout, window_size=size)
    if branches_coincide(layout, size):
        return near
    return Mean(parts=(near, Windows(layout=layout, window_size=size, strided=True)))


def plan_counts(shape: Size, index: int) -> Size:
    """How many boxes each axis of a grid is cut into at a place of the cycle of five.

    Numbers that divide an axis are preferred to those that leave a short last box.
    """
    frames, height, width = plain_shape(shape)
    place = index % (len(PLANNED) + 1)
    if place == 0:
        return frames, 1, 1
    part, area, ratio = PLANNED[place - 1]
    area *= math.sqrt(height * width)
    rows = min(max(math.sqrt(area * ratio), 1.0), height)
    columns = min(max(area / rows, 1.0), width)
    return (
        _count_near(frames, frames * part),
        _count_near(height, rows),
        _count_near(width, columns),
    )


def _count_near(length: int, side: float) -> int:
    """Boxes of an axis whose length is near `side`."""
    nearby = range(max(1, math.ceil(side / NEAR)), min(length, math.floor(side * NEAR)) + 1)
    dividing = [size for size in nearby if length % size == 0]
    if dividing:
        return length // min(dividing, key=lambda size: max(size / side, side / size))
    return min(length, max(1, round(length / side)))
