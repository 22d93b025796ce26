"""A static mask as lists of tiles, made from its rule alone.

Tokens are walked frame by frame in tiles of 64 places. The mask of two tiles depends on the kind of
their frames' pair (`Mask.frame_pair`) and on where they stand in their frames, or, where the rule
depends on differences only, on how far they are apart. Each such case is looked at once.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import BlockLists
from retrofit.kernels.block_sparse.lists import WORD_BITS, pack_mask_bits
from retrofit.layout.grid import Place, TokenGrid, split_positions
from retrofit.patterns.ordering import BlockOrder

if TYPE_CHECKING:
    from retrofit.patterns.mask import Mask

PLACES = WORD_BITS  # of a tile: the keys that one row of it sees in another are one word
CHUNK = 1 << 22  # pairs of tokens that are looked at together
INDEXES = ("rows", "columns", "special", "tokens", "places")  # of tensors `[B, H, S, D]`
HIDDEN, WHOLE = -2, -1  # instead of the number of a mask: nothing of a tile is seen, or all


class Listing(NamedTuple):
    """What one call walks; tensors only.

    Attributes:
        rows: Sequence position of the token in every place of the tiles, int64; places outside the
            grid repeat one that is inside.
        columns: The same for keys, then the special tokens.
        special: Sequence positions of the special tokens.
        tokens: Sequence positions of the grid tokens, ascending.
        places: Place of each of `tokens`.
        indices: Of `BlockLists`: tiles of keys, then every block of further keys.
        counts: Of `BlockLists`.
        mask_ids: Of `BlockLists`.
        mask_bits: Of `BlockLists`.
        num_pairs: Pairs of grid tokens that are seen, int64 `[]`, on the CPU.
    """

    rows: Tensor
    columns: Tensor
    special: Tensor
    tokens: Tensor
    places: Tensor
    indices: Tensor
    counts: Tensor
    mask_ids: Tensor
    mask_bits: Tensor
    num_pairs: Tensor

    @property
    def order(self) -> BlockOrder:
        """Where tokens stand in block order."""
        return BlockOrder(
            self.rows, self.columns, self.special, self.tokens, self.places, None, is_plain=False
        )

    @property
    def lists(self) -> BlockLists:
        """The key tiles of every tile of queries."""
        return BlockLists(self.indices, self.counts, self.mask_ids, self.mask_bits)


def tile_shape(layout: TokenGrid) -> tuple[int, int]:
    """Rows and columns of a tile of 64 places, as square as the grid allows."""
    rows = 8
    while rows > 1 and rows // 2 >= layout.height:
        rows //= 2
    while rows < PLACES and PLACES // rows // 2 >= layout.width:
        rows *= 2
    return rows, PLACES // rows


def list_mask(mask: Mask, device: torch.device) -> Listing:
    """The lists of a mask.

    Args:
        mask: The pattern.
        device: Where the result lives.
    """
    layout, tiles = mask.layout, _Tiles(mask.layout, device)
    ids, bits, seen = _look(mask, tiles)  # [T, T, n, n] and [n_masks, 64], pairs [T, T, n, n]
    frames, number = layout.frames, tiles.number
    ids = ids.transpose(1, 2).reshape(frames * number, frames * number)
    num_others = -(-(layout.num_special_tokens + mask.num_further_keys) // PLACES)
    is_seen = ids != HIDDEN
    counts = is_seen.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    # tiles that are seen come first: a row's entries from its count on are ignored
    indices = (~is_seen).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    ids = pad(ids.gather(1, indices).clamp(min=WHOLE), (0, num_others), value=WHOLE)
    indices = pad(indices, (0, num_others))
    at = counts[:, None] + torch.arange(num_others, device=device)
    others = frames * number + torch.arange(num_others, device=device)
    indices = indices.scatter(1, at, others.expand_as(at))
    ids = ids.scatter(1, at, torch.full_like(at, WHOLE))
    special, tokens = split_positions(layout, device)
    rows = tokens[tiles.raster()]
    indices, counts, ids = (x.int()[None, None] for x in (indices, counts + num_others, ids))
    return Listing(
        rows,
        torch.cat([rows, special]),
        special,
        tokens,
        tiles.place_of_raster(),
        indices.contiguous(),
        counts.contiguous(),
        ids.contiguous(),
        bits[:, :, None],
        seen.cpu(),
    )


class _Tiles:
    """The tiles of one frame, `n` of them.

    Attributes:
        row: Of each place, int64 `[n, 64]`; places outside the grid are outside here too.
        column: The same.
        inside: Whether a place is in the grid, bool `[n, 64]`.
    """

    def __init__(self, layout: TokenGrid, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.shape = rows, columns = tile_shape(layout)
        self.down, self.across = -(-layout.height // rows), -(-layout.width // columns)
        place = torch.arange(PLACES, device=device)
        tile = torch.arange(self.number, device=device)[:, None]
        self.row = tile // self.across * rows + place // columns
        self.column = tile % self.across * columns + place % columns
        self.inside = (self.row < layout.height) & (self.column < layout.width)

    @property
    def number(self) -> int:
        """Tiles of a frame."""
        return self.down * self.across

    def raster(self) -> Tensor:
        """Raster index of the token in every place, all frames."""
        layout = self.layout
        row = self.row.clamp(max=layout.height - 1)
        column = self.column.clamp(max=layout.width - 1)
        frame = torch.arange(layout.frames, device=self.device)[:, None, None]
        return ((frame * layout.height + row) * layout.width + column).flatten()

    def place_of_raster(self) -> Tensor:
        """Place of every token, in raster order, all frames."""
        layout, (rows, columns) = self.layout, self.shape
        index = torch.arange(layout.num_grid_tokens, device=self.device)
        frame, inside = (
            index // (layout.height * layout.width),
            index % (layout.height * layout.width),
        )
        row, column = inside // layout.width, inside % layout.width
        tile = frame * self.number + row // rows * self.across + column // columns
        return tile * PLACES + row % rows * columns + column % columns

    def cases(self, is_shift_invariant: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of tiles whose masks may differ.

        Returns:
            Query tile and key tile of each case `[R]`, and the case of every pair `[n, n]`.
        """
        tile = torch.arange(self.number, device=self.device)
        query, key = tile[:, None].expand(-1, self.number), tile.expand(self.number, -1)
        if not is_shift_invariant:
            case = torch.arange(self.number**2, device=self.device)
            return query.flatten(), key.flatten(), case.view(self.number, self.number)
        down = key // self.across - query // self.across + self.down
        right = key % self.across - query % self.across + self.across
        rows, columns = self.shape
        last_row = key // self.across == (self.down - 1 if self.layout.height % rows else -1)
        last_column = key % self.across == (self.across - 1 if self.layout.width % columns else -1)
        cut = last_row * 2 + last_column * 1
        code = ((down * (2 * self.across + 1) + right) * 4 + cut).flatten()
        _, case = code.unique(return_inverse=True)
        pair = torch.empty(int(case.max()) + 1, dtype=torch.int64, device=self.device)
        pair.scatter_(0, case, torch.arange(case.numel(), device=self.device))
        return pair // self.number, pair % self.number, case.view(self.number, self.number)


def _look(mask: Mask, tiles: _Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """What every tile sees of every other.

    Returns:
        Numbers of masks `[T, T, n, n]`, the masks as words `[n_masks, 64]`, and how many pairs of
        tokens are seen, int64 `[]`.
    """
    frames = mask.layout.frames
    query, key, case = tiles.cases(mask.is_shift_invariant)
    kinds: dict[Hashable, int] = {}
    words, kind = [], torch.zeros(frames, frames, dtype=torch.int64)
    for a in range(frames):
        for b in range(frames):
            name = mask.frame_pair(a, b)
            if name not in kinds:
                kinds[name] = len(kinds)
                words.append(_words(mask, tiles, (a, b), query, key))
            kind[a, b] = kinds[name]
    every = torch.stack(words)  # [kinds, R, 64]
    seen = sum(
        int(times) * _count(part, case, tiles)
        for part, times in zip(every, kind.flatten().bincount(), strict=True)
    )
    is_whole, is_hidden = (every == -1).all(2), (every == 0).all(2)
    is_cut = ~is_whole & ~is_hidden
    bits, number = _distinct(every[is_cut])
    ids = torch.where(is_whole, WHOLE, HIDDEN)
    ids[is_cut] = number
    return ids[:, case][kind.to(ids.device)], bits, torch.tensor(seen)


def _words(
    mask: Mask, tiles: _Tiles, frames: tuple[int, int], query: Tensor, key: Tensor
) -> Tensor:
    """What the places of query tiles see of key tiles in a pair of frames, int64 `[R, 64]`."""
    parts = []
    layout = mask.layout
    for q, k in zip(*(x.split(max(1, CHUNK // PLACES**2)) for x in (query, key)), strict=True):
        row, column = tiles.row[q], tiles.column[q]
        if not mask.is_shift_invariant:  # a rule need not know of places beyond the grid
            row, column = row.clamp(max=layout.height - 1), column.clamp(max=layout.width - 1)
        frame = torch.full((1, 1, 1), frames[0], device=q.device)
        of_query = Place(frame, row[:, :, None], column[:, :, None])
        row, column = (
            tiles.row[k].clamp(max=layout.height - 1),
            tiles.column[k].clamp(max=layout.width - 1),
        )
        frame = torch.full((1, 1, 1), frames[1], device=q.device)
        of_key = Place(frame, row[:, None], column[:, None])
        seen = mask.sees(of_query, of_key) & tiles.inside[k][:, None]
        parts.append(pack_mask_bits(seen.expand(len(q), PLACES, PLACES)).squeeze(2))
    return torch.cat(parts)


def _count(words: Tensor, case: Tensor, tiles: _Tiles) -> int:
    """Pairs of tokens seen in one pair of frames."""
    shifts = torch.arange(PLACES, device=words.device)
    per_place = torch.cat(
        [((part[..., None] >> shifts) & 1).sum(2) for part in words.split(CHUNK // PLACES**2)]
    )  # [R, 64]
    return sum(
        int((per_place[row] * inside).sum()) for row, inside in zip(case, tiles.inside, strict=True)
    )


def _distinct(words: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of `[m, 64]`, and the number of each row among them; found by hashes."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (PLACES,), generator=generator) * 2 + 1
    hashes = (words * odd.to(words.device)).sum(1)
    _, number = hashes.unique(return_inverse=True)
    if not len(words):
        return words.new_zeros(1, PLACES), number
    first = torch.empty(int(number.max()) + 1, dtype=torch.int64, device=words.device)
    first.scatter_(0, number, torch.arange(len(words), device=words.device))
    if bool((words[first][number] == words).all()):
        return words[first], number
    return words.unique(dim=0, return_inverse=True)
