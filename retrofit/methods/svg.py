"""Sparse VideoGen: each head sees either frames nearby or places nearby in all frames.

Paper: https://arxiv.org/abs/2502.01776 (sections 3 and 4). Which one a head is, some of its queries
tell at every step: the mask whose result is nearer to full attention's is taken. Departures: heads
are tried with the masks that they then run with; sampled queries lie evenly over the whole video;
the first frame is what both kinds always see, where the original's places of the first positions in
its permuted order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from retrofit.layout.grid import Place, TokenGrid, split_positions
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import check_at_least_one, check_keep
from retrofit.patterns import AttentionCall, Dense, Mask, Pattern, PerHead

CHUNK = 1 << 24  # scores of sampled queries that are held at a time


@dataclass(frozen=True, kw_only=True)
class SvgConfig(Method):
    """Settings of Sparse VideoGen.

    Attributes:
        keep: Fraction of the query-key pairs that a band keeps, the first frame aside.
        num_sampled: Queries by which the kind of a head is told at every step.
        seed: Of the sampled queries.
    """

    name: ClassVar[str] = "svg"
    summary: ClassVar[str] = "each head of a video sees near in time or near in space, as it needs"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.01776"
    helps: ClassVar[str] = "in videos of many frames and some thousand tokens a frame"
    acts_with: ClassVar[str] = "a smaller keep"

    keep: float = 0.3
    num_sampled: int = 64
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        return check_keep(self.keep) + check_at_least_one("num_sampled", self.num_sampled)

    def refuses(self, network: Network) -> str | None:
        """Needs frames that follow in time."""
        return None if network.has_frames else "it needs frames that follow one another in time"

    def schedule(
        self, state: RunState, network: Network, sites: Sequence[AttentionSite]
    ) -> Mapping[str, int]:
        """Where the sampled queries begin, another place at every step."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + (state.step or 0))
        start = int(torch.randint(2**31, (1,), generator=generator))
        return {f"{network.name}/svg": start}

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """For each head the band whose result is nearer to full attention's."""
        call.refuse_causal(self.name)
        length = layout.num_grid_tokens
        width = math.ceil(length * (1 - math.sqrt(1 - self.keep)))
        if width >= length or layout.frames == 1:
            return Dense(layout)
        bands = [Band(layout=layout, width=width, along=along) for along in ("time", "space")]
        start = state.values.get(f"{site.network}/svg", 0)
        rows = self._rows(layout, start, call.query.device)
        errors = torch.stack([_errors(call, band, rows) for band in bands])  # [2, B, H]
        return PerHead(parts=tuple(bands), choice=errors.argmin(0))

    def _rows(self, layout: TokenGrid, start: int, device: torch.device) -> Tensor:
        """Sequence positions of the sampled queries."""
        _, tokens = split_positions(layout, device)
        number = min(self.num_sampled, tokens.numel())
        step = tokens.numel() // number
        return tokens[(torch.arange(number, device=device) * step + start) % tokens.numel()]


def _errors(call: AttentionCall, band: Mask, rows: Tensor) -> Tensor:
    """Mean square distance of sampled queries' results to full attention's, `[B, H]`."""
    heads = call.query.shape[1]
    keys = torch.arange(call.key.shape[2], device=rows.device)
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    hidden = ~band.mask_mod(zero, zero, rows[:, None], keys)
    step = max(1, CHUNK // (call.query.shape[0] * hidden.numel()))
    found = []
    for part in torch.arange(heads, device=rows.device).split(step):
        some = call.heads(part).queries(rows)
        wide = torch.promote_types(some.value.dtype, torch.float32)
        scores = some.query.to(wide) @ some.key.to(wide).mT * call.factor
        if some.attn_mask is not None and some.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~some.attn_mask, -math.inf)
        elif some.attn_mask is not None:
            scores = scores + some.attn_mask
        full = scores.softmax(-1) @ some.value.to(wide)
        near = scores.masked_fill(hidden, -math.inf).softmax(-1) @ some.value.to(wide)
        found.append((full - near).square().mean((2, 3)))
    return torch.cat(found, 1)


@dataclass(frozen=True, kw_only=True)
class Band(Mask):
    """Tokens near in one order of the video, and the first frame.

    Attributes:
        layout: Of the tokens.
        width: Largest distance that is seen, in tokens of that order.
        along: `time`: frame by frame; `space`: all frames of a place, then those of the next.
    """

    name: ClassVar[str] = "svg"

    layout: TokenGrid
    width: int
    along: Literal["time", "space"]

    def sees(self, query: Place, key: Place) -> Tensor:
        """By the distance in that order."""
        layout = self.layout
        of_query, of_key = (x.row * layout.width + x.column for x in (query, key))
        if self.along == "time":
            size = layout.height * layout.width
            distance = (query.frame - key.frame) * size + of_query - of_key
        else:
            distance = (of_query - of_key) * layout.frames + query.frame - key.frame
        return (distance.abs() <= self.width) | (key.frame == 0)

    def frame_pair(self, query: int, key: int) -> tuple[bool, int]:
        """How far they are apart; the first frame is one for itself."""
        return key == 0, 0 if key == 0 else query - key
