"""No route visits many more pairs than a method needs: at most a quarter at the preset shapes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from retrofit.kernels._triton_launch import Launch, choose_key_launch, choose_query_launch
from retrofit.kernels.block_sparse.ops import _count_pairs
from retrofit.kernels.grid_window.axes import AxisTables, NeighborhoodAxis, WindowAxis
from retrofit.kernels.grid_window.key_tiles import key_tables
from retrofit.kernels.grid_window.native import library, native_attention
from retrofit.kernels.grid_window.pattern import Pattern
from retrofit.kernels.grid_window.triton_route import choose_launch
from retrofit.layout.grid import TokenGrid

MOST = 1.25
Axes = tuple[int, int, int]
NEIGHBORHOODS = {
    "freeswim-1080p": ((21, 68, 120), (21, 31, 53)),
    "freeswim-4k": ((21, 136, 240), (21, 31, 53)),
    "inward-small": ((21, 24, 40), (21, 11, 17)),
}
# windows of T3 on Wan2.1 at 4K, of HiDiffusion at 2K, and the small ones of the CPU
WINDOWS = {
    "t3-4k frames": ((21, 136, 240), (1, 136, 240)),
    "t3-4k rows": ((21, 136, 240), (21, 1, 240)),
    "t3-4k columns": ((21, 136, 240), (21, 136, 1)),
    "t3-4k boxes": ((21, 136, 240), (7, 34, 60)),
    "t3-4k uneven boxes": ((21, 136, 240), (4, 23, 40)),
    "msw-2k": ((1, 128, 128), (1, 64, 64)),
    "t3-small": ((4, 32, 32), (2, 16, 16)),
    "msw-small": ((1, 64, 64), (1, 32, 32)),
}


def neighborhood(shape: Axes, window: Axes) -> Pattern:
    t, y, x = (
        NeighborhoodAxis(n, min(w, n), 1, 1, False) for n, w in zip(shape, window, strict=True)
    )
    return Pattern(grid_of(shape), (t, y, x))


def partition(shape: Axes, window: Axes, *, strided: bool) -> Pattern:
    t, y, x = (WindowAxis(n, w, 0, strided, False) for n, w in zip(shape, window, strict=True))
    return Pattern(grid_of(shape), (t, y, x))


def grid_of(shape: Axes) -> TokenGrid:
    return TokenGrid(frames=shape[0], height=shape[1], width=shape[2])


def kinds_of_tiles(table: AxisTables) -> Counter[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """Tiles of an axis by rows, keys, and what each row sees."""
    kinds: Counter[tuple[int, int, tuple[tuple[int, int], ...]]] = Counter()
    for n in range(table.num_tiles):
        used = table.is_query[n]
        sees = tuple(zip(table.low[n][used].tolist(), table.high[n][used].tolist(), strict=True))
        kinds[(len(sees), max(high for _, high in sees), sees)] += 1
    return kinds


def visited_by_triton(pattern: Pattern, launch: Launch, *, of_keys: bool = False) -> int:
    """Pairs of whole tiles of the kernels: rows and keys that only fill one count too."""
    block_m, block_n = launch.block_m, launch.block_n
    make = key_tables if of_keys else Pattern.tables
    tables = make(pattern, None, None, pattern.block_tile())
    total = 0
    axes = [kinds_of_tiles(tables[i]).items() for i in pattern.order]
    for (slow, times_0), (middle, times_1), (fast, times_2) in itertools.product(*axes):
        rows, behind = slow[0] * middle[0] * fast[0], middle[1] * fast[1]
        per_slot = middle[0] * fast[0]
        for start in range(0, rows, block_m):
            last = min(start + block_m, rows) - 1
            seen = slow[2][start // per_slot : last // per_slot + 1]
            keys = (max(high for _, high in seen) - min(low for low, _ in seen)) * behind
            total += times_0 * times_1 * times_2 * block_m * -(-keys // block_n) * block_n
    return total


@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_triton_visits_few_pairs_of_neighborhoods(name: str) -> None:
    pattern = neighborhood(*NEIGHBORHOODS[name])
    launch = choose_launch(128, 2, 128, 90)
    visited = visited_by_triton(pattern, launch)
    assert visited <= MOST * pattern.count_pairs()


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", WINDOWS)
def test_triton_visits_few_pairs_of_windows(name: str, strided: bool) -> None:
    pattern = partition(*WINDOWS[name], strided=strided)
    launch = choose_launch(64 if "small" in name else 128, 2, 128, 90)
    visited = visited_by_triton(pattern, launch)
    assert visited <= MOST * pattern.count_pairs()


@pytest.mark.parametrize("name", [*NEIGHBORHOODS, *WINDOWS])
def test_gradients_through_triton_visit_few_pairs(name: str) -> None:
    shape, window = (NEIGHBORHOODS | WINDOWS)[name]
    pattern = (
        neighborhood(shape, window)
        if name in NEIGHBORHOODS
        else partition(shape, window, strided=False)
    )
    dim = 64 if "small" in name else 128
    queries, keys = choose_query_launch(dim, 2, 90), choose_key_launch(dim, 2, 90)
    assert visited_by_triton(pattern, queries) <= MOST * pattern.count_pairs()
    assert visited_by_triton(pattern, keys, of_keys=True) <= MOST * pattern.count_pairs()


@pytest.mark.skipif(library()[0] is None, reason=f"native kernel: {library()[1]}")
@pytest.mark.parametrize("name", ["inward-small", "t3-small", "msw-small"])
def test_native_visits_few_pairs(name: str) -> None:
    if name in NEIGHBORHOODS:
        pattern = neighborhood(*NEIGHBORHOODS[name])
    else:
        pattern = partition(*WINDOWS[name], strided=False)
    x, visited = torch.zeros(1, 1, pattern.grid.num_tokens, 1), torch.zeros((), dtype=torch.int64)
    native_attention(x, x, x, pattern, None, None, 1.0, False, visited)
    assert pattern.count_pairs() <= visited.item() <= MOST * pattern.count_pairs()


@pytest.mark.parametrize("name", [*NEIGHBORHOODS, *WINDOWS])
def test_the_count_of_pairs_is_that_of_the_formula(name: str) -> None:
    """So that a change of layout can't visit more unnoticed: N times the keys of a window."""
    shape, window = (NEIGHBORHOODS | WINDOWS)[name]
    pattern = (
        neighborhood(shape, window)
        if name in NEIGHBORHOODS
        else partition(shape, window, strided=False)
    )
    pairs = 1
    for n, w in zip(shape, window, strict=True):
        parts = [min(w, n)] * n if name in NEIGHBORHOODS else window_sizes(n, w)
        pairs *= sum(parts)
    assert pattern.count_pairs() == pairs


def window_sizes(length: int, window: int) -> list[int]:
    """Of each token's window on an axis."""
    return [min(window, length - i // window * window) for i in range(length)]


def test_blocks_of_many_frames_are_nearly_full() -> None:
    """vggt-100: patches in blocks of 128 by 64, special tokens in blocks of their own."""
    patches, special, (block_q, block_k) = 100 * 37 * 27, 500, (128, 64)
    kept = torch.rand(1, 1, -(-patches // block_q), -(-patches // block_k)) < 0.1
    last = torch.ones(1, 1, kept.shape[2], -(-special // block_k), dtype=torch.bool)
    keys = kept.shape[3] * block_k + special
    visited = block_q * block_k * int(torch.cat([kept, last], 3).sum())
    query, key = (torch.empty(1, 1, n, 1, device="meta") for n in (patches, keys))
    needed = _count_pairs(query, key, [torch.cat([kept, last], 3)], block_q, block_k)
    assert needed <= visited <= MOST * needed
