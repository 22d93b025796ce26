"""Radial attention: a window in space that halves as frames lie further apart in time.

Paper: https://arxiv.org/abs/2506.19852 (section 4). Departures: the mask is kept token by token,
where the original rounds it to blocks of 128; the first dense steps and layers are the recipe's.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from retrofit.layout.grid import Place, TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import check_at_least_one
from retrofit.patterns import AttentionCall, Dense, Mask, Pattern


@dataclass(frozen=True, kw_only=True)
class RadialConfig(Method):
    """Settings of radial attention.

    Attributes:
        decay: Factor of the windows of frames two and more apart; larger keeps more.
        least_window: Tokens below which a window does not shrink; instead frames are left out, all
            but every second, fourth, ... of those so far apart.
        next_frame: Whether the frame before and the one after are seen by a window of `half` the
            frame (as the original has it for Wan) or `whole` (for HunyuanVideo).
    """

    name: ClassVar[str] = "radial"
    summary: ClassVar[str] = "windows of a video that shrink with the distance in time"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.19852"
    helps: ClassVar[str] = "in videos of many frames, the longer the more"
    acts_with: ClassVar[str] = "a smaller decay or least_window"

    decay: float = 1.0
    least_window: int = 128
    next_frame: Literal["half", "whole"] = "half"

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        problems = check_at_least_one("least_window", self.least_window)
        if not 0 < self.decay < float("inf"):
            problems.append(f"decay: expected more than 0 and finite, got {self.decay}.")
        return problems

    def refuses(self, network: Network) -> str | None:
        """Needs frames that follow in time."""
        return None if network.has_frames else "it needs frames that follow one another in time"

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """The windows of this layout."""
        windows = tuple([self._window(layout, apart) for apart in range(layout.frames)])
        if all(window >= layout.height * layout.width for window in windows):
            return Dense(layout)
        return Radial(layout=layout, windows=windows)

    def _window(self, layout: TokenGrid, apart: int) -> int:
        """How far in raster order a token sees in frames so far apart; -1 is not at all."""
        size = len(range(layout.height * layout.width))
        if apart == 0 or (apart == 1 and self.next_frame == "whole"):
            return size
        if apart == 1:
            return size // 2
        window = 2.0 ** (size.bit_length() - apart.bit_length())
        every = max(1, int(self.least_window / window))
        if window < self.least_window and apart % every:
            return -1
        return int(max(window * self.decay, self.least_window))


@dataclass(frozen=True, kw_only=True)
class Radial(Mask):
    """Windows by the distance in time; the first frame is seen by all.

    Attributes:
        layout: Of the tokens.
        windows: For each distance in frames the largest distance in raster order that is seen.
    """

    name: ClassVar[str] = "radial"

    layout: TokenGrid
    windows: tuple[int, ...]

    def sees(self, query: Place, key: Place) -> Tensor:
        """By the distance in the frame, as far as that in time allows."""
        width = self.layout.width
        apart = (query.frame - key.frame).abs()
        distance = ((query.row - key.row) * width + query.column - key.column).abs()
        windows = torch.tensor(self.windows, device=apart.device)
        return (distance <= windows[apart]) | (key.frame == 0)

    def frame_pair(self, query: int, key: int) -> Hashable:
        """How far they are apart; the first frame is one for itself."""
        return "first" if key == 0 else abs(query - key)
