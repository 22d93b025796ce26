"""Rows of a padded batch, each cut into windows and blocks as if its text were alone."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.patterns import AttentionCall, Pattern, Shares
from retrofit.patterns.call import is_visible


class Span(NamedTuple):
    """The tokens of a row that are no padding.

    Attributes:
        start: Position of the first.
        length: How many there are.
    """

    start: int
    length: int


class PaddingReader:
    """Reads what masks hide, once for a mask: all layers of a network are given the same one."""

    def __init__(self) -> None:
        """Start without a mask."""
        self._latest: tuple[weakref.ref[Tensor], int, tuple[Span, ...] | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        """A copy of a patched model has read nothing."""
        return {"_latest": None}

    def spans(self, mask: Tensor) -> tuple[Span, ...] | None:
        """Where each row's own tokens lie.

        Args:
            mask: Of an attention call, `[B, 1, 1 or S, S]`.

        Returns:
            One span for each row, or None for a mask that hides nothing, or more than padding at
            the ends of rows.
        """
        if self._latest is not None:
            known, version, spans = self._latest
            if known() is mask and mask._version == version:
                return spans
        spans = read_spans(mask)
        self._latest = weakref.ref(mask), mask._version, spans
        return spans


def read_spans(mask: Tensor) -> tuple[Span, ...] | None:
    """See `PaddingReader.spans`."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.is_meta:
        return None
    rows = mask[:, 0]
    if rows.shape[1] > 1 and rows.stride(1) and not bool((rows == rows[:, :1]).all()):
        return None
    row = rows[:, 0]
    shown = is_visible(row)
    if row.dtype != torch.bool and bool((shown & (row != 0)).any()):
        return None
    place = torch.arange(row.shape[1], device=row.device)
    first = torch.where(shown, place, row.shape[1]).amin(1)
    lengths = shown.sum(1)
    last = torch.where(shown, place, -1).amax(1)
    if bool(shown.all()) or not bool((last - first + 1 == lengths)[lengths > 0].all()):
        return None
    pairs = zip(first.tolist(), lengths.tolist(), strict=True)
    return tuple(Span(start, length) for start, length in pairs)


def attend_spans(
    call: AttentionCall,
    spans: Sequence[Span],
    attend: Callable[[AttentionCall], tuple[Tensor, Pattern]],
) -> tuple[Tensor, Pattern]:
    """Attention of each row's own tokens to each other; rows of one span together.

    Args:
        call: Of a padded batch.
        spans: Of its rows.
        attend: What takes a call without padding.

    Returns:
        Output, zeros for padding, and the pattern of all rows. Where that is dense, the output is
        the dense model's own, bit for bit.
    """
    rows: dict[Span, list[int]] = defaultdict(list)
    for row, span in enumerate(spans):
        if span.length:
            rows[span].append(row)
    batch, heads, length, _ = call.query.shape
    out = call.value.new_zeros(batch, length, heads, call.value.shape[3]).transpose(1, 2)
    parts = []
    for span, numbers in rows.items():
        index = torch.tensor(numbers, device=call.query.device)
        found, pattern = attend(_cut(call, span, index))
        out[index, :, span.start : span.start + span.length] = found
        parts.append((len(numbers), pattern))
    joined = Shares(parts=tuple(parts))
    return (call.with_full_mask().attend_densely() if joined.is_dense else out), joined


def _cut(call: AttentionCall, span: Span, rows: Tensor) -> AttentionCall:
    """The call of some rows' own tokens."""
    part = slice(span.start, span.start + span.length)
    hidden = call.hidden_states
    if hidden is not None and hidden.dim() == 3:
        hidden = hidden[rows, part]
    return replace(
        call,
        query=call.query[rows, :, part],
        key=call.key[rows, :, part],
        value=call.value[rows, :, part],
        attn_mask=None,
        hidden_states=hidden,
    )
