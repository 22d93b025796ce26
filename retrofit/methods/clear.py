"""CLEAR: every token of a picture sees the tokens in a circle around it, and all of the text.

Paper: https://arxiv.org/abs/2412.16112 (section 3.2, with the pooled keys of its appendix). The
paper distils the weights for it; without that, as here, the output degrades. Departures: texts of
any length; in a grid of several frames a circle stays in its own; where squares of `pool` tokens do
not fill the grid the last ones are short, and the weights of what they hold count the more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall, Circle, Dense, Pattern

POOLED_LENGTH = 10  # by which the original multiplies the tokens of a call that has pooled keys


@dataclass(frozen=True, kw_only=True)
class ClearConfig(Method):
    """Settings of CLEAR. The paper distils the model for them first; without, expect a loss.

    Attributes:
        radius: Tokens nearer than this are seen, borders cut the circle off. 1 is the token itself;
            a radius beyond the grid's diagonal is dense. The paper has 8, 16 and 32. In a video a
            circle stays in its frame.
        pool: Side of the squares of tokens whose keys and values are added up to one further key
            each, which all tokens of the picture see. Those at the right and at the bottom may be
            short. None for none; the paper has 4.
        pool_weights: Weights of the tokens of a square, row by row, as the distillation has learnt
            them. None for their mean.
        temperature_base: Tokens N0 of the training size, text included (4608 for FLUX). A call of N
            tokens (N ten times as many with `pool`) gets the scale sqrt(log_N0(N) / head_dim); 0
            keeps the model's own.
    """

    name: ClassVar[str] = "clear"
    summary: ClassVar[str] = "every token of a picture sees a circle around it, and all of the text"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.16112"
    helps: ClassVar[str] = (
        "from pictures of 1024x1024 on (64x64 tokens), and on weights distilled for it"
    )
    acts_with: ClassVar[str] = "a smaller radius"
    lossy: ClassVar[str] = (
        "lossy: the paper distils the weights for it; without that the output degrades, the more "
        "the smaller the radius"
    )

    radius: float = 16.0
    pool: int | None = None
    pool_weights: tuple[float, ...] | None = None
    temperature_base: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        problems = []
        if not 0 < self.radius < math.inf:
            problems.append(f"radius: expected more than 0 and finite, got {self.radius}.")
        if self.pool is not None and self.pool < 1:
            problems.append(f"pool: expected 1 or more, got {self.pool}.")
        problems += self._check_weights()
        if self.temperature_base < 0 or self.temperature_base == 1:
            problems.append(
                f"temperature_base: expected 0 or at least 2 tokens, got {self.temperature_base}."
            )
        return problems

    def _check_weights(self) -> list[str]:
        """What is wrong with the weights of a square."""
        number = 0 if self.pool_weights is None else len(self.pool_weights)
        if self.pool_weights is None or (self.pool is not None and number == self.pool**2):
            return []
        if self.pool is None:
            side = math.isqrt(number)
            fitting = f", {side} for these" if side and side**2 == number else ""
            return [
                f"pool_weights: says how tokens are pooled, and nothing pools them. Set `pool` to "
                f"the side of the squares{fitting}, or leave pool_weights out."
            ]
        return [
            f"pool_weights: expected {self.pool**2} weights, pool x pool = {self.pool} x "
            f"{self.pool} of them row by row, got {number}."
        ]

    def refuses(self, network: Network) -> str | None:
        """Needs attention over a grid."""
        if any(site.kind != "cross" and site.layout is not None for site in network.sites):
            return None
        return "it needs attention over a grid of known height and width"

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """The circles of this layout."""
        circle = Circle(
            layout=layout, radius=self.radius, pool=self.pool, pool_weights=self.pool_weights
        )
        return Dense(layout) if circle.sees_all and not self.temperature_base else circle

    def attend(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> tuple[Tensor, Pattern]:
        """Attention with the scale of a call of so many tokens."""
        if self.temperature_base:
            length = layout.num_tokens * (1 if self.pool is None else POOLED_LENGTH)
            factor = math.sqrt(math.log(length) / math.log(self.temperature_base))
            call = call.with_scale(factor * call.factor)
        return super().attend(site, layout, call, state)
