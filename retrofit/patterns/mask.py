"""Static masks over a grid: one rule for two places, from which block lists are derived.

A subclass says `sees(query, key)` for places of the grid; special tokens, tiles, cut blocks,
padding, the longest row and the number of pairs are found here, once for a pattern and a device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from retrofit.kernels import BlockLists
from retrofit.layout.grid import Place, TokenGrid, place_of
from retrofit.patterns.base import Attended, Pattern
from retrofit.patterns.blocks import Ordered, attend_blocks
from retrofit.patterns.call import AttentionCall
from retrofit.patterns.listing import INDEXES, PLACES, Listing, list_mask

MASKS: dict[str, type[Mask]] = {}


class Mask(Pattern):
    """A static mask; subclasses are frozen dataclasses of plain settings beside `layout`.

    Attributes:
        is_shift_invariant: Whether `sees` depends on differences of rows and of columns only, so
            that tiles as far apart are alike.
    """

    is_shift_invariant: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Register the class, so that a traced graph can name it."""
        MASKS[cls.__name__] = cls

    def sees(self, query: Place, key: Place) -> Tensor:
        """Whether a token of the grid sees another one: places that broadcast, bool out."""
        raise NotImplementedError

    def frame_pair(self, query: int, key: int) -> Hashable:
        """What two frames' mask depends on: pairs of frames with equal results share one mask."""
        return query, key

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """`sees`, with special tokens that see all and are seen by all."""
        (of_query, is_query), (of_key, is_key) = (place_of(self.layout, x) for x in (query, key))
        return self.sees(of_query, of_key) | ~is_query | ~is_key

    def further_keys(self, x: Tensor) -> Tensor:
        """Keys or values `[B, H, n, D]` behind those of the sequence, from these `[B, H, S, D]`."""
        return x[:, :, :0]

    def attend(self, call: AttentionCall, *, backend: str | None, with_lse: bool) -> Attended:
        """As block lists."""
        call.refuse_causal(self.name)
        listing = self.listed(call.query.device)
        further = self.further_keys if self.num_further_keys else None
        return attend_listed(
            call, listing, listing.lists, further=further, backend=backend, with_lse=with_lse
        )

    def define(self, call: AttentionCall) -> Attended:
        """With the further keys, and room for them in the call's mask."""
        if self.num_further_keys:
            key, value = (torch.cat([x, self.further_keys(x)], 2) for x in (call.key, call.value))
            call = replace(call, key=key, value=value)
        return super().define(call)

    def listed(self, device: torch.device) -> Listing:
        """The mask as lists of tiles, made once for a device."""
        if torch.compiler.is_compiling():
            return Listing(*_list_as_constant(self.encode(), str(device)))
        return _listed(self, device)

    def pairs(self) -> float:
        """Counted in the lists; of special tokens all."""
        inside, special = self.layout.num_grid_tokens, self.layout.num_special_tokens
        listing = self.listed(torch.device("cpu"))
        others = special * (self.layout.num_tokens + inside) + self.num_further_keys * inside
        return float(listing.num_pairs.item() + others)

    def encode(self) -> tuple[str, tuple[int, ...], Any]:
        """Plain numbers and names for `decode_mask`; sizes of a traced graph become constants."""
        settings = tuple([getattr(self, name) for name in setting_names(self)])
        return type(self).__name__, self.layout.encode(), _plain(settings)


def attend_listed(
    call: AttentionCall,
    listing: Listing,
    blocks: BlockLists,
    *,
    backend: str | None,
    with_lse: bool,
    further: Callable[[Tensor], Tensor] | None = None,
) -> Attended:
    """Attention over the tiles of a listing.

    Args:
        call: In the order of the sequence.
        listing: Where its tokens stand.
        blocks: Tiles of keys for each tile of queries.
        backend: Of `block_sparse_attention`.
        with_lse: Also return the log-sum-exp.
        further: Gives the keys, and the values, behind those of the sequence.
    """
    order = listing.order
    ordered, value = Ordered.of(call, order), order.keys(call.value)
    if further is not None:
        ordered = ordered._replace(key=torch.cat([ordered.key, further(call.key)], 2))
        value = torch.cat([value, further(call.value)], 2)
    return attend_blocks(
        call,
        order,
        ordered,
        value,
        blocks,
        block_size=(PLACES, PLACES),
        backend=backend,
        with_lse=with_lse,
    )


def setting_names(mask: Any) -> list[str]:
    """Fields of a mask, or of a class of masks, beside its layout."""
    return [item.name for item in fields(mask) if item.name != "layout"]


def decode_mask(code: tuple[str, tuple[int, ...], Any]) -> Mask:
    """The mask that `encode` was called on."""
    name, layout, settings = code
    cls = MASKS[name]
    values = dict(zip(setting_names(cls), settings, strict=True))
    return cls(layout=TokenGrid.decode(layout), **values)  # type: ignore[call-arg]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple([_plain(item) for item in value])
    # the length of a range is a plain number, also of a size that a traced graph leaves open
    return value if value is None or isinstance(value, (bool, float, str)) else len(range(value))


@functools.lru_cache(maxsize=64)
def _listed(mask: Mask, device: torch.device) -> Listing:
    if device.type != "meta":
        with _disable_current_modes(), torch.device("cpu"):  # remembered, whoever asks first
            return list_mask(mask, device)
    # the lists keep their values, from which the tiles that are visited are counted
    found = _listed(mask, torch.device("cpu"))
    moved = {name: getattr(found, name).to("meta") for name in INDEXES}
    return found._replace(**moved)


@torch.compiler.assume_constant_result
def _list_as_constant(code: tuple[str, tuple[int, ...], Any], device: str) -> tuple[Tensor, ...]:
    """The tensors of a listing, which a traced graph holds as constants."""
    return tuple(_listed(decode_mask(code), torch.device(device)))
