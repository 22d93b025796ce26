"""Patterns made of patterns: means of branches, heads and rows of a batch that differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import BlockLists
from retrofit.layout.grid import TokenGrid
from retrofit.patterns.base import Attended, Pattern
from retrofit.patterns.call import AttentionCall
from retrofit.patterns.mask import Mask, attend_listed
from retrofit.runtime.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Mean(Pattern):
    """The mean of several patterns' results; it has no mask of its own.

    Attributes:
        parts: Patterns of one layout.
    """

    parts: tuple[Pattern, ...]
    name: ClassVar[str] = "mean"

    @property
    def layout(self) -> TokenGrid:  # type: ignore[override]
        """That of every part."""
        return self.parts[0].layout

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """Each part, then their mean.

        Raises:
            UnsupportedError: If the log-sum-exp is wanted, which a mean does not have.
        """
        if with_lse:
            raise UnsupportedError("mean: expected a call without log-sum-exp: a mean has none.")
        return self._mean(
            [part.attend(call, backend=backend, with_lse=False) for part in self.parts]
        )

    def define(self, call: AttentionCall) -> Attended:
        """The mean of the parts' definitions."""
        return self._mean([part.define(call) for part in self.parts])

    def _mean(self, found: list[Attended]) -> Attended:
        outs = [part.out for part in found]
        return Attended(sum(outs[1:], outs[0]) / len(outs))

    def pairs(self) -> float:
        """The work of every part."""
        return sum(part.pairs() for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Halves(Pattern):
    """One pattern for the first half of the batch, another one for the second.

    Attributes:
        first: Pattern.
        second: Pattern of the same layout.
    """

    first: Pattern
    second: Pattern
    name: ClassVar[str] = "halves"

    @property
    def layout(self) -> TokenGrid:  # type: ignore[override]
        """That of both."""
        return self.first.layout

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """That of the half, of a batch whose last row is asked about too."""
        is_first = batch < (int(batch.max()) + 1) // 2
        first = self.first.mask_mod(batch, head, query, key)
        return torch.where(is_first, first, self.second.mask_mod(batch, head, query, key))

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """Each half by itself."""
        first, second = self._halves(call)
        return _join(
            self.first.attend(first, backend=backend, with_lse=with_lse),
            self.second.attend(second, backend=backend, with_lse=with_lse),
        )

    def define(self, call: AttentionCall) -> Attended:
        """Each half by its definition."""
        first, second = self._halves(call)
        return _join(self.first.define(first), self.second.define(second))

    def _halves(self, call: AttentionCall) -> tuple[AttentionCall, AttentionCall]:
        half = call.query.shape[0] // 2
        return call.rows(slice(half)), call.rows(slice(half, None))

    def pairs(self) -> float:
        """The mean of both."""
        return (self.first.pairs() + self.second.pairs()) / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class PerHead(Pattern):
    """A static mask for each head, or for each head of each row of the batch; one call for all.

    Attributes:
        parts: Masks of one layout.
        choice: Number of the part, int64 `[B or 1, H]`.
    """

    parts: tuple[Mask, ...]
    choice: Tensor
    name: ClassVar[str] = "per head"

    @property
    def layout(self) -> TokenGrid:  # type: ignore[override]
        """That of every part."""
        return self.parts[0].layout

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """That of the head's part."""
        number = self.choice.expand(int(batch.max()) + 1, -1)[batch, head]
        masks = [part.mask_mod(batch, head, query, key) for part in self.parts]
        return sum(((number == i) & mask for i, mask in enumerate(masks)), number < 0)

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """The lists of every head's part side by side."""
        call.refuse_causal(self.name)
        listings = [part.listed(call.query.device) for part in self.parts]
        blocks = _choose_lists([listing.lists for listing in listings], self.choice)
        return attend_listed(call, listings[0], blocks, backend=backend, with_lse=with_lse)

    def pairs(self) -> float:
        """Weighted by how many heads take each part."""
        if self.choice.is_meta:
            return math.nan
        share = self.choice.flatten().bincount(minlength=len(self.parts)).cpu().double()
        return sum(
            weight * part.pairs()
            for weight, part in zip((share / share.sum()).tolist(), self.parts, strict=True)
        )


def _choose_lists(parts: list[BlockLists], choice: Tensor) -> BlockLists:
    """Lists `[B or 1, H, n_q, max]`, of each head those of its part."""
    width = max(part.max_count for part in parts)
    indices, ids, bits, first = [], [], [], 0
    for part in parts:
        assert part.mask_ids is not None and part.mask_bits is not None  # noqa: PT018, S101
        room = (0, width - part.max_count)
        indices.append(pad(part.indices[0, 0], room))
        shifted = torch.where(part.mask_ids < 0, part.mask_ids, part.mask_ids + first)
        ids.append(pad(shifted[0, 0], room))
        bits.append(part.mask_bits)
        first += part.mask_bits.shape[0]
    counts = torch.stack([part.counts[0, 0] for part in parts])
    return BlockLists(
        torch.stack(indices)[choice].contiguous(),
        counts[choice].contiguous(),
        torch.stack(ids)[choice].contiguous(),
        torch.cat(bits),
    )


@dataclass(frozen=True, kw_only=True)
class Shares(Pattern):
    """What was done with parts of a call, heads or rows of the batch, for observers.

    Attributes:
        parts: How many heads or rows, and their pattern.
    """

    parts: tuple[tuple[int, Pattern], ...]
    name: ClassVar[str] = "shares"

    @property
    def layout(self) -> TokenGrid:  # type: ignore[override]
        """That of the longest part."""
        layouts = [pattern.layout for _, pattern in self.parts]
        return max(layouts, key=lambda layout: layout.num_tokens)

    @property
    def is_dense(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(pattern.is_dense for _, pattern in self.parts)

    def keep(self) -> float:
        """Of the pairs of all parts."""
        kept = sum(number * pattern.pairs() for number, pattern in self.parts)
        return kept / sum(number * part.layout.num_tokens**2 for number, part in self.parts)

    def pairs(self) -> float:
        """As many as the fraction is of the layout's."""
        return self.keep() * self.layout.num_tokens**2


@dataclass(frozen=True, kw_only=True)
class Reused(Pattern):
    """Nothing is computed: the result is one of an earlier call."""

    layout: TokenGrid
    name: ClassVar[str] = "reused"

    def pairs(self) -> float:
        """None."""
        return 0.0


def _join(first: Attended, second: Attended) -> Attended:
    """Results of both halves of the batch in one."""
    out = torch.cat([first.out, second.out])
    if first.lse is None or second.lse is None:
        return Attended(out)
    return Attended(out, torch.cat([first.lse, second.lse]))
