"""A short tour of the operators: where each is faster than dense on this machine, and where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from retrofit.kernels.grid_window import branches_coincide
from retrofit.layout.grid import TokenGrid
from retrofit.patterns import Mean, Neighborhood, Pattern, Windows
from retrofit.profiling.bench.attention import Attention, Route, Shape
from retrofit.profiling.bench.lines import Line, dense_base, time_routes
from retrofit.profiling.bench.patterns import (
    Size,
    block_sparse_route,
    draw_block_mask,
    pattern_route,
)
from retrofit.runtime.devices import on_accelerator

BLOCK_SIZE = (128, 64)
KEEPS = (0.1, 0.5)
CPU_HEADS, GPU_HEADS = 2, 16
CPU_SIDES, GPU_SIDES = (16, 32, 64, 96), (32, 64, 128, 192)
FRAMES = 4  # of the grids with frames, whose sides are halved


@dataclass(frozen=True, kw_only=True)
class TourChoice:
    """What to time.

    Attributes:
        device: Where it runs.
        dtypes: Of the tensors.
        sides: Height and width of the square grids, from which tokens follow.
        rounds: Timed rounds; None takes what the device needs.
        seed: Of everything drawn.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    sides: tuple[int, ...]
    rounds: int | None = None
    seed: int = 0


def tour(
    choice: TourChoice, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Line]:
    """Every operator at every size, dense beside it in the same rounds.

    Args:
        choice: What to time.
        progress: Called as `progress(what, done, total)`.

    Yields:
        A line for each case; one that was refused has no time.
    """
    base = dense_base(choice.device)
    total = len(choice.dtypes) * len(choice.sides)
    for i, (dtype, side) in enumerate((d, s) for d in choice.dtypes for s in choice.sides):
        if progress is not None:
            name = str(dtype).removeprefix("torch.")
            progress(f"{name}, {side * side} tokens", i, total)
        for case, attention, route in _cases(choice, dtype, side):
            lines = time_routes(case, attention, [route], rounds=choice.rounds, base=base)
            yield from (line for line in lines if line.route == route.name)


def _cases(
    choice: TourChoice, dtype: torch.dtype, side: int
) -> Iterator[tuple[str, Attention, Route]]:
    generator = torch.Generator().manual_seed(choice.seed + side)
    heads = GPU_HEADS if on_accelerator(choice.device) else CPU_HEADS
    tokens = side * side
    shape = Shape(heads=heads, seq_len=tokens, dtype=dtype, device=choice.device)
    attention = Attention(shape, generator)
    for keep in KEEPS:
        mask = draw_block_mask(heads, tokens, BLOCK_SIZE, keep, generator)
        route = block_sparse_route(attention, mask, BLOCK_SIZE)
        yield f"block-sparse, keep {keep:g}", attention, route
    half, third = side // 2, side // 3 // 2 * 2 + 1
    picture = TokenGrid(height=side, width=side)
    video = TokenGrid(frames=FRAMES, height=side // 2, width=side // 2)
    patterns: dict[str, Pattern] = {
        "windows, half a side": Windows(
            layout=picture, window_size=(1, half, half), shift=(0, half // 2, half // 2)
        ),
        "window around each, a third": Neighborhood(layout=picture, window_size=(1, third, third)),
        "t3, frame by frame": _boxes(video, (1, side // 2, side // 2)),
        "t3, boxes": _boxes(video, (FRAMES, side // 8, side // 8)),
    }
    for case, pattern in patterns.items():
        yield case, attention, pattern_route(attention, pattern)


def _boxes(layout: TokenGrid, size: Size) -> Pattern:
    """Contiguous boxes and strided ones, their mean; one where both are the same."""
    near, far = (Windows(layout=layout, window_size=size, strided=far) for far in (False, True))
    return near if branches_coincide(layout, size) else Mean(parts=(near, far))


def losing(lines: Sequence[Line]) -> list[Line]:
    """Those that are slower than dense, and those that were refused."""
    return [line for line in lines if line.speed is None or line.speed.median < 1]
