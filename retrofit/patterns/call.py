"""One attention call, as one object."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from retrofit.runtime.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What `scaled_dot_product_attention` was called with, and what the site's module was given.

    Attributes:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S_k, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, S_k, D_v]`.
        attn_mask: bool (True is seen) or added to the scores, broadcastable to `[B, H, S, S_k]`.
        is_causal: Whether a query sees no key after it.
        scale: Factor of the scores, `D ** -0.5` when None.
        dropout_p: Of the attention weights; only dense attention takes any.
        query_offset: Position among the keys of the first query, behind a KV cache.
        hidden_states: First argument of the attention module, for learned parts.
        learned: What the method's `modules` made for this site, trained since.
        where: The site, for messages.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    query_offset: int = 0
    hidden_states: Tensor | None = None
    learned: nn.Module | None = None
    where: str = ""

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def with_scale(self, scale: float | None) -> AttentionCall:
        """The same call with another scale; None leaves it."""
        return self if scale is None else replace(self, scale=scale)

    def in_one_dtype(self) -> AttentionCall:
        """Query, key and value cast as autocast casts them, else to the dtype of the value."""
        device = self.query.device.type
        dtype = self.value.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        elif self.query.dtype == self.key.dtype == dtype:
            return self
        query, key, value = (x.to(dtype) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def with_full_mask(self) -> AttentionCall:
        """The mask with four axes, the last one as long as the keys."""
        if self.attn_mask is None:
            return self
        mask, num_keys = self.attn_mask, self.key.shape[2]
        mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))
        return replace(self, attn_mask=mask.expand(-1, -1, -1, num_keys))

    def mask_of(self, rows: Tensor) -> Tensor | None:
        """The full mask's rows of some queries; the only row where all are alike."""
        mask = self.attn_mask
        return mask if mask is None or mask.shape[2] == 1 else mask.index_select(2, rows)

    def queries(self, rows: Tensor) -> AttentionCall:
        """The call of some queries alone."""
        query = self.query.index_select(2, rows)
        return replace(self, query=query, attn_mask=self.mask_of(rows))

    def heads(self, heads: Tensor) -> AttentionCall:
        """The call of some query heads alone, keys and values repeated where they are shared."""
        groups = self.query.shape[1] // self.key.shape[1]
        of_keys = heads if groups == 1 else heads // groups
        mask = self.attn_mask
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.index_select(1, heads)
        return replace(
            self,
            query=self.query.index_select(1, heads),
            key=self.key.index_select(1, of_keys),
            value=self.value.index_select(1, of_keys),
            attn_mask=mask,
        )

    def rows(self, part: slice) -> AttentionCall:
        """The call of some entries of the batch alone."""
        mask = self.attn_mask
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[part]
        hidden = self.hidden_states
        return replace(
            self,
            query=self.query[part],
            key=self.key[part],
            value=self.value[part],
            attn_mask=mask,
            hidden_states=hidden if hidden is None else hidden[part],
        )

    def attend_densely(self) -> Tensor:
        """The dense model's own attention, bit for bit, `[B, H, S, D_v]`."""
        mask = self.attn_mask
        if mask is not None and mask.dtype not in (torch.bool, self.query.dtype):
            mask = mask.to(self.query.dtype)
        return scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.query.shape[1] != self.key.shape[1],
        )

    def refuse_causal(self, name: str) -> None:
        """Refuse a call that is causal.

        Raises:
            UnsupportedError: If it is.
        """
        if self.is_causal:
            raise UnsupportedError(
                f"{name}: expected attention without `is_causal`, got it. Leave that site out with "
                "`sites`."
            )

    def refuse_mask(self, name: str, why: str) -> None:
        """Refuse a call that has a mask.

        Raises:
            UnsupportedError: If it has one.
        """
        if self.attn_mask is not None:
            raise UnsupportedError(f"{name}: expected attention without a mask {why}, got one.")


def join_masks(mask: Tensor | None, shown: Tensor | None) -> Tensor | None:
    """Both masks in one, the second one bool."""
    if mask is None or shown is None:
        return shown if mask is None else mask
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, -math.inf)


def is_visible(mask: Tensor) -> Tensor:
    """Where a mask shows a key, whatever its dtype."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def visible_keys(mask: Tensor) -> Tensor:
    """Keys that any query sees, `[B', H', S', S]` to bool `[B', S]`."""
    return is_visible(mask).any(2).any(1)
