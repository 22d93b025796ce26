"""Windows of a grid, products over its axes, run by the window kernels."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from retrofit.kernels.grid_window import (
    Pattern as GridPattern,
)
from retrofit.kernels.grid_window import (
    neighborhood_pattern,
    pattern_attention,
    window_pattern,
)
from retrofit.layout.grid import Place, TokenGrid
from retrofit.patterns.base import Attended
from retrofit.patterns.call import AttentionCall
from retrofit.patterns.mask import Mask
from retrofit.runtime.errors import UnsupportedError

Size = tuple[int, int, int]
CausalAxes = tuple[bool, bool, bool]
NOT_CAUSAL: CausalAxes = (False, False, False)


class AxisProduct(Mask):
    """What is seen on each axis by itself; a subclass says so as `product`."""

    is_causal: CausalAxes = NOT_CAUSAL

    @property
    def product(self) -> GridPattern:
        """The three axes as the window kernels take them."""
        raise NotImplementedError

    def sees(self, query: Place, key: Place) -> Tensor:
        """On every axis."""
        return self.product.sees(query, key)

    def frame_pair(self, query: int, key: int) -> Hashable:
        """Whether the frames see each other."""
        frames = self.product.axes[0]
        return bool(frames.sees(torch.tensor(query), torch.tensor(key)))

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """By the window kernels, or as block lists where those are asked for."""
        if backend == "flex":
            return super().attend(call, backend=backend, with_lse=with_lse)
        if call.is_causal:
            self._refuse_grid()
            causal = replace(self, is_causal=(True, True, True))  # type: ignore[type-var]
            return causal.attend(replace(call, is_causal=False), backend=backend, with_lse=with_lse)
        found = pattern_attention(
            call.query,
            call.key,
            call.value,
            self.product,
            attn_mask=call.attn_mask,
            scale=call.scale,
            return_lse=with_lse,
            backend=backend,
        )
        return Attended(*found) if with_lse else Attended(found)

    def _refuse_grid(self) -> None:
        """Refuse a causal call anywhere but on a plain sequence, where "after" means one thing."""
        layout = self.layout
        if layout.frames > 1 or layout.height > 1 or layout.num_special_tokens:
            raise UnsupportedError(
                f"{self.name}: expected attention without `is_causal` on the grid {layout}, got "
                "it. Leave that site out with `sites`."
            )

    def pairs(self) -> float:
        """From the axes."""
        return float(self.product.count_pairs())


@dataclass(frozen=True, kw_only=True)
class Windows(AxisProduct):
    """The grid cut into windows, each of which sees itself.

    Papers: https://arxiv.org/abs/2311.17528 (shifted windows: the grid is rolled by `-shift` before
    it is cut, and nothing is hidden across the seam), https://arxiv.org/abs/2512.13492 (contiguous
    and strided windows).

    Attributes:
        layout: Of the tokens.
        window_size: Tokens of a window along frames, height and width; the last may be short.
        shift: Cyclic shift of the windows.
        strided: Windows of every n-th token of an axis, `n = ceil(length / window_size)`.
        is_causal: Whether a query sees nothing after it on an axis.
    """

    name: ClassVar[str] = "window"

    layout: TokenGrid
    window_size: Size
    shift: Size = (0, 0, 0)
    strided: bool = False
    is_causal: CausalAxes = NOT_CAUSAL

    @property
    def product(self) -> GridPattern:
        """As the window kernels take it."""
        settings = self.window_size, self.shift, self.strided, self.is_causal
        return window_pattern(self.layout, *settings)[0]


@dataclass(frozen=True, kw_only=True)
class Neighborhood(AxisProduct):
    """A window around each query, pushed inward at the borders.

    Paper: https://arxiv.org/abs/2504.16922 (section 3).

    Attributes:
        layout: Of the tokens.
        window_size: Keys a query sees along frames, height and width.
        stride: Queries that share a window.
        dilation: Distance of neighboring keys.
        is_causal: Whether a query sees nothing after it on an axis.
    """

    name: ClassVar[str] = "neighborhood"

    layout: TokenGrid
    window_size: Size
    stride: Size = (1, 1, 1)
    dilation: Size = (1, 1, 1)
    is_causal: CausalAxes = NOT_CAUSAL

    @property
    def product(self) -> GridPattern:
        """As the window kernels take it."""
        settings = self.window_size, self.stride, self.dilation, self.is_causal
        return neighborhood_pattern(self.layout, *settings)
