"""What an attention output must be: float64, on all rows or on some drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from retrofit.patterns import Pattern
from retrofit.runtime.devices import to_float64
from retrofit.runtime.finite import is_finite

# Relative error against float64 up to which an output is taken for right.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ROUNDED_SCORES = 6e-3  # where scores and weights are rounded to bfloat16
ALL_ROWS = 4096  # longest sequence of which every row is checked
NUM_ROWS = 64  # of each head, of longer ones


class SampledRows:
    """Query rows whose exact output is known.

    Attributes:
        rows: Positions, int64 `[H, R]`, the same for every batch entry.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, generator: torch.Generator):
        """Draw rows of every head, all of them where the sequence is short."""
        self.tensors = query, key, value
        heads, seq_len = query.shape[1:3]
        if seq_len <= ALL_ROWS:
            rows = torch.arange(seq_len).expand(heads, -1)
        else:
            draws = [torch.randperm(seq_len, generator=generator)[:NUM_ROWS] for _ in range(heads)]
            rows = torch.stack(draws)
        self.rows = rows.to(query.device)

    def expected(self, visible: Callable[[int, int, Tensor], Tensor] | None = None) -> Tensor:
        """The exact output of the rows.

        Args:
            visible: Called as `visible(batch, head, rows)`, gives bool `[R, S]`; None sees all.

        Returns:
            float64 `[B, H, R, D_v]`; zeros where a row sees nothing.
        """
        query, key, value = self.tensors
        group = query.shape[1] // key.shape[1]
        out = to_float64(query.new_empty(*query.shape[:2], self.rows.shape[1], value.shape[3]))
        for b in range(query.shape[0]):
            for h in range(query.shape[1]):
                rows = self.rows[h]
                scores = to_float64(query[b, h, rows]) @ to_float64(key[b, h // group]).T
                scores *= 1 / math.sqrt(query.shape[3])
                if visible is not None:
                    scores.masked_fill_(~visible(b, h, rows).to(scores.device), -math.inf)
                weights = scores.softmax(-1).nan_to_num_(0.0)
                out[b, h] = weights @ to_float64(value[b, h // group])
        return out

    def error_against(self, expected: Tensor) -> Callable[[Tensor], float]:
        """A function from a whole output `[B, H, S, D_v]` to its relative error on the rows."""

        def error(output: Tensor) -> float:
            index = self.rows[None, :, :, None].expand(output.shape[0], -1, -1, output.shape[3])
            return relative_error(output.gather(2, index), expected)

        return error


def relative_error(output: Tensor, expected: Tensor) -> float:
    """`||output - expected|| / ||expected||`; infinite where the output holds NaN."""
    if not is_finite(output):
        return math.inf
    return float((to_float64(output) - expected).norm() / expected.norm())


def visible_by(pattern: Pattern) -> Callable[[int, int, Tensor], Tensor]:
    """What a pattern shows to some rows."""

    def visible(batch: int, head: int, rows: Tensor) -> Tensor:
        b, h = (torch.tensor(i, device=rows.device) for i in (batch, head))
        keys = torch.arange(pattern.layout.num_tokens, device=rows.device)
        return pattern.mask_mod(b, h, rows[:, None], keys)

    return visible
