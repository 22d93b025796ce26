"""What a pattern is: which keys each query sees, in one definition that everything else reads."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from retrofit.kernels import masked_attention
from retrofit.layout.grid import TokenGrid
from retrofit.patterns.call import AttentionCall

CHUNK = 1 << 24  # pairs that are looked at together when they are counted


class Attended(NamedTuple):
    """Result of a pattern's attention.

    Attributes:
        out: `[B, H, S, D_v]`.
        lse: Natural log-sum-exp of the scores, float32 or wider `[B, H, S]`, where asked for.
    """

    out: Tensor
    lse: Tensor | None = None


class Pattern:
    """Which keys each query of a layout sees. Values: immutable, and hashable unless chosen.

    A pattern defines `mask_mod`, or as a `Mask` only `sees`. How it is executed, how many pairs it
    keeps and what tests hold it against follow from that.

    Attributes:
        layout: Of the tokens.
        is_dense: Whether it is the dense model's own call, nothing else done.
        num_further_keys: Keys behind those of the sequence, which every grid token sees.
        name: For messages.
    """

    layout: TokenGrid
    is_dense: bool = False
    num_further_keys: int = 0
    name: ClassVar[str] = "pattern"

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query sees a key; integer tensors of positions that broadcast, bool out.

        The signature is FlexAttention's.
        """
        raise NotImplementedError

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """Run the call; masks have four axes and all tensors one dtype. See `attend`."""
        raise NotImplementedError

    def define(self, call: AttentionCall) -> Attended:
        """The definition of `attend`: dense attention under the mask, in float32 or wider."""
        mask = whole_mask(self, call.query.shape[0], call.query.shape[1], call.query.device)
        if call.is_causal:
            mask = mask & torch.ones_like(mask[0, 0]).tril()
        tensors = call.query, call.key, call.value, mask
        return Attended(*masked_attention(*tensors, attn_mask=call.attn_mask, scale=call.scale))

    def pairs(self) -> float:
        """Query-key pairs that are computed, mean over batch and heads.

        Pairs of two branches count twice. NaN where they depend on values, and those are on meta.
        """
        return _count_pairs(self)

    def keep(self) -> float:
        """Fraction of all pairs that is computed; 1 when dense."""
        return self.pairs() / self.layout.num_tokens**2


class Dense(Pattern):
    """Everything is seen: the dense model's own attention, bit for bit."""

    is_dense = True
    name = "dense"

    def __init__(self, layout: TokenGrid) -> None:
        """Of a layout."""
        self.layout = layout

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Always."""
        return (query >= 0) & (key >= 0)

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """By PyTorch; by the definition where the log-sum-exp is wanted."""
        return self.define(call) if with_lse else Attended(call.attend_densely())

    def pairs(self) -> float:
        """All."""
        return float(self.layout.num_tokens**2)


def attend(
    call: AttentionCall, pattern: Pattern, *, backend: str | None = None, return_lse: bool = False
) -> Any:
    """Attend to what a pattern shows.

    Args:
        call: Tensors `[B, H, S, D]`, in any dtypes, with any mask that broadcasts.
        pattern: Of the call's layout.
        backend: `triton`, `native`, `flex`, `torch`, or `reference`, the masked dense definition;
            None takes the first that can run the call.
        return_lse: Also return the log-sum-exp of the scores.

    Returns:
        Output `[B, H, S, D_v]`, or `(output, lse)`. A query that sees nothing gives 0 and -inf.

    Raises:
        GridError: If the call does not have the pattern's number of tokens.
        UnsupportedError: If the backend or the pattern can't honour the call.
    """
    call = call.in_one_dtype()
    if not (pattern.is_dense and not return_lse and backend is None):
        pattern.layout.check(call.query.shape[2], call.where or pattern.name)
        call = call.with_full_mask()
    if backend == "reference":
        found = pattern.define(call)
    else:
        found = pattern.attend(call, backend=backend, with_lse=return_lse)
    return tuple(found) if return_lse else found.out


def whole_mask(
    pattern: Pattern, batch: int = 1, heads: int = 1, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask of every pair, bool `[B or 1, H or 1, S, S]`, from `mask_mod`.

    Further keys of a pattern stand behind those of the sequence.
    """
    query = torch.arange(pattern.layout.num_tokens, device=device)
    key = torch.arange(pattern.layout.num_tokens + pattern.num_further_keys, device=device)
    b, h = torch.arange(batch, device=device), torch.arange(heads, device=device)
    mask = pattern.mask_mod(b[:, None, None, None], h[:, None, None], query[:, None], key)
    return mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))


@functools.lru_cache(maxsize=256)
def _count_pairs(pattern: Pattern) -> float:
    """By the definition, some queries at a time."""
    length = pattern.layout.num_tokens
    place, zero = torch.arange(length), torch.zeros((), dtype=torch.int64)
    rows = max(1, CHUNK // length)
    return float(
        sum(
            pattern.mask_mod(zero, zero, part[:, None], place).sum().item()
            for part in place.split(rows)
        )
    )
