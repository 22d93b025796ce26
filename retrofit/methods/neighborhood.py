"""Neighborhoods: every token sees the tokens around it, as many at the border as elsewhere.

Paper: https://arxiv.org/abs/2504.16922 (section 3, generalized neighborhood attention). Departure:
a dilation is lowered on an axis that the dilated window would not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import (
    Size,
    check_at_least_one,
    check_window_settings,
    choose_neighborhood,
    covers,
    per_axis,
)
from retrofit.patterns import AttentionCall, Dense, Neighborhood, Pattern

DEFAULT_KEEP = 0.25
CausalAxes = tuple[bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class NeighborhoodConfig(Method):
    """Settings of neighborhoods; of `window_size` and `keep` one is given, else `keep` is 0.25.

    Three values mean frames, height and width (a text runs along width), one value means all.

    Attributes:
        window_size: Keys a query sees per axis, itself included; an even window leans to the left.
            A window as large as the grid is dense.
        keep: Fraction of the query-key work that remains, from which the window is chosen for the
            number of tokens of each call, as near to a cube as the grid allows.
        stride: Queries that share one window: as large as the window, it cuts the grid into blocks.
        dilation: Distance of neighboring keys.
        is_causal: Whether a query sees nothing after it on an axis (frames of a video).
    """

    name: ClassVar[str] = "neighborhood"
    summary: ClassVar[str] = "a window around every token, pushed inward at the borders"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.16922"
    helps: ClassVar[str] = (
        "where the window is a small part of each axis: large pictures, long videos and texts"
    )
    acts_with: ClassVar[str] = "a smaller window_size or keep"
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("window_size", "keep"),)

    window_size: int | Size | None = None
    keep: float | None = None
    stride: int | Size = 1
    dilation: int | Size = 1
    is_causal: bool | CausalAxes = False

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        problems = check_window_settings(self.window_size, self.keep)
        problems += check_at_least_one("stride", self.stride)
        problems += check_at_least_one("dilation", self.dilation)
        if self.window_size is not None and not problems:
            pairs = zip(per_axis(self.window_size), per_axis(self.stride), strict=True)
            if any(stride > window for window, stride in pairs):
                problems.append(
                    f"stride: expected at most window_size {self.window_size}, got {self.stride}."
                )
        return problems

    def __post_init__(self) -> None:
        """Check the settings, and fill in how much is kept where nothing says it."""
        super().__post_init__()
        if self.window_size is None and self.keep is None:
            object.__setattr__(self, "keep", DEFAULT_KEEP)

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """A neighborhood of every token of this layout."""
        if self.window_size is not None:
            size = per_axis(self.window_size)
        else:
            keep = DEFAULT_KEEP if self.keep is None else self.keep
            size = choose_neighborhood(layout.shape, keep)
        causal = self.is_causal
        if not causal and covers(layout.shape, size):
            return Dense(layout)
        return Neighborhood(
            layout=layout,
            window_size=size,
            stride=_each(min, per_axis(self.stride), size),
            dilation=_each(_fitting_dilation, per_axis(self.dilation), layout.shape, size),
            is_causal=(causal, causal, causal) if isinstance(causal, bool) else causal,
        )


def _each(function: Callable[..., int], *sizes: Size) -> Size:
    frames, height, width = map(function, *sizes)
    return frames, height, width


def _fitting_dilation(dilation: int, length: int, window: int) -> int:
    return max(1, min(dilation, length // min(window, length)))
