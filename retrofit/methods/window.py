"""Windows: the grid is cut into boxes, and attention stays inside each.

Paper: https://arxiv.org/abs/2103.14030 (section 3.2). Departures: the windows come from a fraction
of the work to keep where none are given, the last one of an axis may be short, and shifted windows
are cyclic without a mask across the seam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retrofit.kernels import window_attention
from retrofit.layout.grid import TokenGrid, kept_pairs
from retrofit.layout.sites import AttentionSite
from retrofit.methods.base import DENSE, Method, Operator
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import (
    Size,
    check_causal,
    check_window_settings,
    choose_partition,
    covers,
    partition_fraction,
    per_axis,
)
from retrofit.runtime.errors import ConfigError

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

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: With every mistake at once.
        """
        problems = check_window_settings(self.window_size, self.keep)
        if problems:
            raise ConfigError(" ".join(problems))
        if self.window_size is None and self.keep is None:
            object.__setattr__(self, "keep", DEFAULT_KEEP)

    def build(self, site: AttentionSite, grid: TokenGrid, state: RunState) -> Operator:
        """Windows of this grid, shifted at every second site."""
        if self.window_size is not None:
            size = per_axis(self.window_size)
        else:
            keep = DEFAULT_KEEP if self.keep is None else self.keep
            size = choose_partition(grid.shape, keep)
        if covers(grid.shape, size):
            return DENSE
        shift = (0, 0, 0)
        if self.shift and site.index % 2:
            shift = _half_windows(grid.shape, size)
        return _Windows(grid=grid, window_size=size, shift=shift)


@dataclass(frozen=True, kw_only=True)
class _Windows:
    grid: TokenGrid
    window_size: Size
    shift: Size

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        check_causal(self.grid, is_causal, "window")
        return window_attention(
            query,
            key,
            value,
            grid=self.grid,
            window_size=self.window_size,
            shift=self.shift,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
        )

    def keep_fraction(self, query: Tensor, key: Tensor) -> float:
        """A token sees the tokens of its own window, and the special ones."""
        frames, height, width = map(partition_fraction, self.grid.shape, self.window_size)
        return kept_pairs(self.grid, frames * height * width)


def _half_windows(shape: Size, window_size: Size) -> Size:
    """Half a window on every axis that is cut, 0 on the others."""
    pairs = zip(shape, window_size, strict=True)
    frames, height, width = (window // 2 if window < length else 0 for length, window in pairs)
    return frames, height, width
