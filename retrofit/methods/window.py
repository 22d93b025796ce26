"""Windows: the grid is cut into boxes, and attention stays inside each.

Paper: https://arxiv.org/abs/2103.14030 (section 3.2). Departures: the windows come from a fraction
of the work to keep where none are given, the last one of an axis may be short, and shifted windows
are cyclic without a mask across the seam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import (
    Size,
    check_window_settings,
    choose_partition,
    covers,
    per_axis,
)
from retrofit.patterns import AttentionCall, Dense, Pattern, Windows

DEFAULT_KEEP = 0.5


@dataclass(frozen=True, kw_only=True)
class WindowConfig(Method):
    """Settings of windows; of `window_size` and `keep` one is given, else `keep` is 0.5.

    Attributes:
        window_size: Tokens of a window along frames, height and width (a text runs along width);
            one value for all, or three. A window as large as the grid is dense.
        keep: Fraction of the query-key work that remains, from which the windows are chosen for
            the number of tokens of each call, as near to cubes as the grid allows.
        shift: Whether every second site's windows are shifted by half a window, so that what one
            site separates the next one joins.
    """

    name: ClassVar[str] = "window"
    summary: ClassVar[str] = "windows of a text, a picture or a video, attended to one by one"
    paper: ClassVar[str] = "https://arxiv.org/abs/2103.14030"
    helps: ClassVar[str] = (
        "where windows are a small part of the input; the cheapest of all, and the coarsest"
    )
    acts_with: ClassVar[str] = "a smaller window_size or keep"
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("window_size", "keep"),)

    window_size: int | Size | None = None
    keep: float | None = None
    shift: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        return check_window_settings(self.window_size, self.keep)

    def __post_init__(self) -> None:
        """Check the settings, and fill in how much is kept where nothing says it."""
        super().__post_init__()
        if self.window_size is None and self.keep is None:
            object.__setattr__(self, "keep", DEFAULT_KEEP)

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """Windows of this layout, shifted at every second site."""
        if self.window_size is not None:
            size = per_axis(self.window_size)
        else:
            keep = DEFAULT_KEEP if self.keep is None else self.keep
            size = choose_partition(layout.shape, keep)
        if covers(layout.shape, size):
            return Dense(layout)
        shift = (0, 0, 0)
        if self.shift and site.index % 2:
            shift = _half_windows(layout.shape, size)
        return Windows(layout=layout, window_size=size, shift=shift)


def _half_windows(shape: Size, window_size: Size) -> Size:
    """Half a window on every axis that is cut, 0 on the others."""
    pairs = zip(shape, window_size, strict=True)
    frames, height, width = (window // 2 if window < length else 0 for length, window in pairs)
    return frames, height, width
