"""Every method once, with settings that exercise it, and the networks that it is tried on.

The tests of `tests/methods` run over this table; a new method is one row. A row's `seen` says in
plain loops, apart from the package, which keys a query sees: that is what its pattern is held to.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Level, Network
from retrofit.methods import Method
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.clear import ClearConfig
from retrofit.methods.freeswim import FreeSwimConfig
from retrofit.methods.hidiffusion import HiDiffusionConfig
from retrofit.methods.neighborhood import NeighborhoodConfig
from retrofit.methods.radial import RadialConfig
from retrofit.methods.run_state import RunState
from retrofit.methods.seer import SeerConfig
from retrofit.methods.svg import SvgConfig
from retrofit.methods.t3 import T3Config, plan_counts
from retrofit.methods.window import WindowConfig
from retrofit.patterns import AttentionCall, Pattern
from tests.newer_masks import band_masks, gated_masks, radial_mask

TEXT, PICTURE, VIDEO = ("bert-padded", "minilm"), ("vit", "dinov2-registers"), ("wan-t2v",)
UNETS = ("sd15", "sdxl")
Size = tuple[int, int, int]
Mask = Tensor  # bool [B or 1, H or 1, S, S]
Seen = Callable[[Method, "Call"], list[Mask]]


class Call(NamedTuple):
    """What a method is asked about: a site in the middle of a run, and the tensors of its call."""

    site: AttentionSite
    grid: TokenGrid
    state: RunState
    query: Tensor
    key: Tensor
    value: Tensor

    def weighing(self) -> Call:
        """The same call with values for which the result is the attention weights."""
        value = torch.eye(self.grid.num_tokens, dtype=torch.float64)
        return self._replace(value=value.expand(*self.key.shape[:2], -1, -1))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method with one set of settings.

    Attributes:
        config: The settings.
        dense: Settings with which it is the dense model, or None where there are none.
        models: Names in `FAMILY_MODELS` that it fits.
        grids: Grids that it is tried on, none of which its sizes divide.
        seen: The masks whose attention it averages.
        takes_mask: Whether it honours an attention mask; else it refuses one.
        takes_causal: Whether it honours `is_causal` on a plain sequence; else it refuses.
        chooses: Whether the keys seen depend on what is attended to, its scale and its mask.
        is_rowwise: Whether a row of a batch is treated as it is alone.
    """

    config: Method
    dense: Method | None
    models: tuple[str, ...]
    grids: tuple[TokenGrid, ...]
    seen: Seen
    takes_mask: bool = True
    takes_causal: bool = True
    chooses: bool = False
    is_rowwise: bool = True


SENTENCE = TokenGrid(width=67)
PHOTO = TokenGrid(height=7, width=11, num_prefix_tokens=3)
FRAMES = TokenGrid(frames=3, height=5, width=7)
MOTION = TokenGrid(frames=9, height=3, width=5, num_suffix_tokens=4)
VIEWS = TokenGrid(frames=3, height=4, width=7, num_frame_prefix_tokens=2)
BETWEEN = TokenGrid(height=6, width=9, num_prefix_tokens=2, num_suffix_tokens=1)
ANY = (SENTENCE, PHOTO, FRAMES, VIEWS, BETWEEN)


def make_call(
    config: Method, grid: TokenGrid, *, batch: int = 2, index: int = 1, seed: int = 0
) -> Call:
    """Random float64 tensors, head i i + 1 times as wide, for a site in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.arange(1.0, 3.0, dtype=torch.float64).view(2, 1, 1)
    query, key, value = (
        width * torch.randn(batch, 2, grid.num_tokens, dim, generator=generator, dtype=width.dtype)
        for dim in (8, 8, 5)
    )
    site = AttentionSite(
        path=f"blocks.{index}.attn",
        index=index,
        block=index,
        kind="self",
        num_heads=2,
        head_dim=8,
        level=0,
        layout="grid",
    )
    state = RunState()
    levels = tuple(Level(index=i, scale=2**i, has_attention=True, down_pairs=()) for i in range(2))
    network = Network(family="any", sites=(site,), levels=levels)
    state.schedules.append(lambda state: config.schedule(state, network, (site,)))
    state.at_step(3, 10)
    return Call(site, grid, state, query, key, value)


def as_given(call: Call, **settings: Any) -> AttentionCall:
    """The call as a patched site hands it to a method; `settings` are further fields of it."""
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    made = AttentionCall(**tensors, where=call.site.path, **settings)
    return made.in_one_dtype().with_full_mask()


def attend(config: Method, call: Call, **settings: Any) -> tuple[Tensor, Pattern]:
    """What a method makes of a call, and by which pattern."""
    return config.attend(call.site, call.grid, _with_learned(config, call, settings), call.state)


def pattern_of(config: Method, call: Call, **settings: Any) -> Pattern:
    """By which pattern a method would take a call."""
    return config.pattern(call.site, call.grid, _with_learned(config, call, settings), call.state)


def _with_learned(config: Method, call: Call, settings: dict[str, Any]) -> AttentionCall:
    learned = config.modules(call.site, Network(family="any", sites=(call.site,)))
    if learned is not None:
        settings = {"learned": learned.double(), **settings}
    return as_given(call, **settings)


def places(grid: TokenGrid) -> list[tuple[int, int, int] | None]:
    """The place in the grid of every token of the sequence, None for special tokens."""
    found: list[tuple[int, int, int] | None] = [None] * grid.num_prefix_tokens
    for t in range(grid.frames):
        found += [None] * grid.num_frame_prefix_tokens
        found += [(t, y, x) for y in range(grid.height) for x in range(grid.width)]
    return found + [None] * grid.num_suffix_tokens


def mask_by_axis(grid: TokenGrid, sees: Callable[[int, int, int], bool]) -> Mask:
    """The mask in which special tokens see all and are seen, and the others as an axis says.

    `sees(axis, i, j)` is whether coordinate `i` sees coordinate `j`; all three axes must agree.
    """
    tables = [
        torch.tensor([[sees(axis, i, j) for j in range(length)] for i in range(length)])
        for axis, length in enumerate(grid.shape)
    ]
    tokens = torch.tensor([i for i, place in enumerate(places(grid)) if place is not None])
    where = torch.tensor([place for place in places(grid) if place is not None])
    inside = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    for axis, table in enumerate(tables):
        inside &= table[where[:, axis, None], where[None, :, axis]]
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    mask[tokens[:, None], tokens[None, :]] = inside
    return mask[None, None]


def _windows(size: Size, *, shifted: bool = False) -> Seen:
    def seen(config: Method, call: Call) -> list[Mask]:
        shift = [size[i] // 2 if shifted and size[i] < call.grid.shape[i] else 0 for i in range(3)]
        return [_shifted_windows(call.grid, size, shift)]

    return seen


def _shifted_windows(grid: TokenGrid, size: Size, shift: Sequence[int]) -> Mask:
    def window(axis: int, place: int) -> int:
        length = grid.shape[axis]
        return (place - shift[axis]) % length // min(size[axis], length)

    return mask_by_axis(grid, lambda axis, i, j: window(axis, i) == window(axis, j))


def _neighbors(
    size: Size,
    stride: Size = (1, 1, 1),
    dilation: Size = (1, 1, 1),
    causal: tuple[bool, bool, bool] = (False, False, False),
) -> Seen:
    def seen(config: Method, call: Call) -> list[Mask]:
        def sees(axis: int, i: int, j: int) -> bool:
            length = call.grid.shape[axis]
            window = min(size[axis], length)
            d = max(1, min(dilation[axis], length // window))
            if i % d != j % d:
                return False
            last, i, j = len(range(i % d, length, d)) - 1, i // d, j // d
            window, step = min(window, last + 1), min(stride[axis], window)
            if causal[axis]:
                leader = min(i // step * step + step - 1, last)
                return j <= i and leader - j < window
            leader = min(i // step * step + step // 2, last)
            right = window // 2 + window % 2 - 1
            center = max(min(leader, last - right), window // 2)
            return center - window // 2 <= j <= center + right

        return [mask_by_axis(call.grid, sees)]

    return seen


def _boxes(config: Method, call: Call) -> list[Mask]:
    assert isinstance(config, T3Config)
    if config.cycle is None:
        counts = plan_counts(call.grid.shape, call.site.index)
    else:
        counts = config.cycle[call.site.index % len(config.cycle)]
    shape = call.grid.shape
    sizes = [math.ceil(n / min(count, n)) for n, count in zip(shape, counts, strict=True)]
    numbers = [math.ceil(n / size) for n, size in zip(shape, sizes, strict=True)]
    return [
        mask_by_axis(call.grid, lambda axis, i, j: i // sizes[axis] == j // sizes[axis]),
        mask_by_axis(call.grid, lambda axis, i, j: i % numbers[axis] == j % numbers[axis]),
    ]


def _blocks(order: list[int] | None = None) -> Callable:
    """Chosen blocks by loops; `order` walks the grid tokens of `PHOTO` otherwise than raster."""

    def seen(config: Method, call: Call) -> list[Mask]:
        assert isinstance(config, BlockSparseConfig)
        tokens = [i for i, place in enumerate(places(call.grid)) if place is not None]
        if order is not None:
            tokens = [tokens[i] for i in order]
        batch, heads = call.query.shape[:2]
        mask = torch.ones(batch, heads, call.grid.num_tokens, call.grid.num_tokens).bool()
        for b, h in itertools.product(range(batch), range(heads)):
            _choose_blocks(config, call.query[b, h], call.key[b, h], tokens, mask[b, h])
        return [mask]

    return seen


def _choose_blocks(
    config: BlockSparseConfig, query: Tensor, key: Tensor, tokens: list[int], mask: Mask
) -> None:
    block_q, block_k = config.block_size
    rows = [tokens[i : i + block_q] for i in range(0, len(tokens), block_q)]
    columns = [tokens[i : i + block_k] for i in range(0, len(tokens), block_k)]

    def pool(x: Tensor) -> Tensor:
        return x.mean(0) if config.pooling == "avg" else x.amax(0)

    for row in rows:
        scores = torch.stack([pool(query[row]) @ pool(key[column]) for column in columns])
        shares = (scores / math.sqrt(query.shape[1])).softmax(0)
        best = shares.argsort(descending=True).tolist()
        count = max(1, int(len(columns) * (config.keep or 0)))
        if config.mass is not None:
            sums = shares[best].cumsum(0)
            count = max(count, int((sums <= config.mass + 1e-5).sum()))
        for column in best[count:]:
            mask[torch.tensor(row)[:, None], torch.tensor(columns[column])] = False


def _hidiffusion(config: Method, call: Call) -> list[Mask]:
    assert isinstance(config, HiDiffusionConfig)
    generator = torch.Generator().manual_seed(config.seed * 100_003 + (call.state.step or 0))
    choice = int(torch.randint(4, (1,), generator=generator))
    height, width = (math.ceil(n / 2) for n in call.grid.shape[1:])
    shift = (0, height // 4 * choice, width // 4 * choice)
    return [_shifted_windows(call.grid, (1, height, width), shift)]


def _circles(config: Method, call: Call) -> list[Mask]:
    assert isinstance(config, ClearConfig)
    return [circle_mask(call.grid, config.radius)[None, None]]


@functools.cache
def circle_mask(grid: TokenGrid, radius: float, num_pooled: int = 0) -> Tensor:
    """Which tokens are near, bool `[S, S + num_pooled]`; special tokens see no pooled key."""
    where = places(grid)

    def sees(a: tuple[int, int, int] | None, b: tuple[int, int, int] | None) -> bool:
        if a is None or b is None:
            return True
        return a[0] == b[0] and (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2 < radius**2

    rows = [[sees(a, b) for b in where] + [a is not None] * num_pooled for a in where]
    return torch.tensor(rows)


def _photo_in_tiles(side: int) -> list[int]:
    rows, columns = PHOTO.height, PHOTO.width
    return [
        y * columns + x
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for y in range(top, min(top + side, rows))
        for x in range(left, min(left + side, columns))
    ]


WINDOW_KEEP = {SENTENCE: (1, 1, 17), PHOTO: (1, 4, 6), FRAMES: (3, 3, 4)}


def _chosen_windows(config: Method, call: Call) -> list[Mask]:
    return _windows(WINDOW_KEEP[call.grid])(config, call)


TABLE: dict[str, Row] = {
    "window-size": Row(
        config=WindowConfig(window_size=(2, 3, 4)),
        dense=WindowConfig(window_size=512),
        models=(*TEXT, *PICTURE, *VIDEO, *UNETS, "controlnet", "flux", "sd3"),
        grids=ANY,
        seen=_windows((2, 3, 4)),
    ),
    "window-shifted": Row(
        config=WindowConfig(window_size=(2, 3, 5), shift=True),
        dense=WindowConfig(window_size=512, shift=True),
        models=("bert-padded", "vit", "wan-t2v"),
        grids=ANY,
        seen=_windows((2, 3, 5), shifted=True),
    ),
    "window-keep": Row(
        config=WindowConfig(keep=0.25),
        dense=WindowConfig(keep=1.0),
        models=("bert-padded", "vit", "wan-t2v", "sd15"),
        grids=tuple(WINDOW_KEEP),
        seen=_chosen_windows,
    ),
    "neighborhood-size": Row(
        config=NeighborhoodConfig(window_size=(2, 3, 5)),
        dense=NeighborhoodConfig(window_size=512),
        models=(*TEXT, *PICTURE, *VIDEO, *UNETS, "flux-kontext"),
        grids=ANY,
        seen=_neighbors((2, 3, 5)),
    ),
    "neighborhood-dilated": Row(
        config=NeighborhoodConfig(window_size=3, stride=2, dilation=(1, 2, 3)),
        dense=NeighborhoodConfig(window_size=512, stride=2, dilation=(1, 2, 3)),
        models=("bert-padded", "vit", "wan-t2v"),
        grids=ANY,
        seen=_neighbors((3, 3, 3), (2, 2, 2), (1, 2, 3)),
    ),
    "neighborhood-causal": Row(
        config=NeighborhoodConfig(window_size=(3, 4, 5), is_causal=(True, False, False)),
        dense=NeighborhoodConfig(keep=1.0),
        models=("wan-t2v",),
        grids=(FRAMES, VIEWS),
        seen=_neighbors((3, 4, 5), causal=(True, False, False)),
    ),
    "block-sparse-keep": Row(
        config=BlockSparseConfig(keep=0.5, block_size=(8, 4)),
        dense=BlockSparseConfig(keep=1.0),
        models=(*TEXT, *PICTURE, *VIDEO, *UNETS, "flux-kontext", "sd35-medium"),
        grids=ANY,
        seen=_blocks(),
        takes_causal=False,
        chooses=True,
    ),
    "block-sparse-mass": Row(
        config=BlockSparseConfig(keep=0.25, mass=0.6, block_size=(6, 5), pooling="max"),
        dense=BlockSparseConfig(keep=None, mass=1.0, block_size=(6, 5)),
        models=("bert-padded", "vit", "wan-t2v"),
        grids=ANY,
        seen=_blocks(),
        takes_causal=False,
        chooses=True,
    ),
    "block-sparse-tiles": Row(
        config=BlockSparseConfig(keep=0.3, block_size=(8, 4), order="tiles"),
        dense=BlockSparseConfig(keep=None, mass=1.0, order="hilbert", block_size=(8, 4)),
        models=("vit", "wan-t2v", "sd15"),
        grids=(PHOTO,),
        seen=_blocks(_photo_in_tiles(2)),
        takes_causal=False,
        chooses=True,
    ),
    "clear": Row(
        config=ClearConfig(radius=3),
        dense=ClearConfig(radius=512),
        models=("flux", "flux-kontext", "sd35-medium", "vit", "sd15"),
        grids=ANY,
        seen=_circles,
        takes_causal=False,
    ),
    "t3-cycle": Row(
        config=T3Config(cycle=((3, 1, 1), (1, 2, 4), (2, 3, 2))),
        dense=T3Config(cycle=((1, 1, 1),)),
        models=("wan-t2v", "wan-vace"),
        grids=(FRAMES, VIEWS, PHOTO, BETWEEN),
        seen=_boxes,
        takes_causal=False,
    ),
    "t3-planned": Row(
        config=T3Config(),
        dense=T3Config(cycle=((1, 1, 1),)),
        models=("wan-t2v", "wan-i2v"),
        grids=(FRAMES, VIEWS),
        seen=_boxes,
        takes_causal=False,
    ),
    "hidiffusion": Row(
        config=HiDiffusionConfig(min_scale=0.0),
        dense=HiDiffusionConfig(windows=False, min_scale=99.0),
        models=UNETS,
        grids=(TokenGrid(height=9, width=14), TokenGrid(height=16, width=11)),
        seen=_hidiffusion,
    ),
    "freeswim": Row(
        config=FreeSwimConfig(window_size=(3, 3), dual_path=False, temperature_tokens=0),
        dense=FreeSwimConfig(window_size=(99, 99), temperature_tokens=0),
        models=("wan-t2v", "wan-i2v"),
        grids=(FRAMES,),
        seen=_neighbors((99, 3, 3)),
        takes_mask=False,
        takes_causal=False,
    ),
    "freeswim-guided": Row(
        config=FreeSwimConfig(window_size=(3, 3), cache_steps=0, temperature_tokens=0),
        dense=FreeSwimConfig(window_size=(99, 99), cache_steps=0, temperature_tokens=0),
        models=("wan-t2v",),
        grids=(FRAMES,),
        seen=lambda config, call: [
            torch.cat(
                [
                    _neighbors((99, 3, 3))(config, call)[0],
                    torch.ones(1, 1, call.grid.num_tokens, call.grid.num_tokens).bool(),
                ]
            )
        ],
        takes_mask=False,
        takes_causal=False,
        is_rowwise=False,  # its halves are meant to differ
    ),
    "radial": Row(
        config=RadialConfig(least_window=4),
        dense=RadialConfig(decay=1e3, least_window=1, next_frame="whole"),
        models=VIDEO,
        grids=(FRAMES, MOTION),
        seen=lambda config, call: radial_mask(config, call, places(call.grid)),
        takes_causal=False,
    ),
    "svg": Row(
        config=SvgConfig(keep=0.3, num_sampled=7),
        dense=SvgConfig(keep=1.0),
        models=VIDEO,
        grids=(FRAMES, MOTION),
        seen=lambda config, call: band_masks(config, call, places(call.grid)),
        takes_causal=False,
        chooses=True,
    ),
    "seer": Row(
        config=SeerConfig(keep=0.4, block_size=8),
        dense=SeerConfig(keep=1.0),
        models=(*TEXT, *PICTURE, *VIDEO, "sd15", "flux"),
        grids=ANY,
        seen=lambda config, call: gated_masks(config, call, places(call.grid)),
        takes_causal=False,
        chooses=True,
    ),
}
