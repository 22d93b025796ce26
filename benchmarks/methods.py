"""The operators of whole methods at the sizes they were published for, layout included.

python -m benchmarks.methods --device cuda --preset t3-4k,freeswim-1080p,freeswim-4k,vggt-100,msw-2k

Where all queries would take dense attention too long, it is timed on a part of them with all keys
and scaled by their number (`base_part` in the JSON). `--shrink 4` divides height, width and windows
by four, for a smaller machine. Variants of vggt-100 leave stages out, so that each has a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import common
from benchmarks.grid_peers import GridProblem, flex_on_grid, rearranged
from benchmarks.peers import Missing
from benchmarks.tables import print_missing, print_rows
from retrofit.kernels import block_sparse_attention, lists_from_mask, select_blocks
from retrofit.layout.grid import TokenGrid
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.t3 import boxes
from retrofit.patterns import Neighborhood, Windows
from retrofit.profiling.bench.attention import Attention, Route, Shape
from retrofit.profiling.bench.checking import visible_by
from retrofit.profiling.bench.lines import Line, time_routes
from retrofit.profiling.bench.patterns import Size, block_sparse_route, pattern_route

CYCLE = ((21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6))
VIEW_KEEPS = (0.25, 0.1)
DENSE_TOKENS = 32768  # queries that dense attention is timed on, at most
CAMERA_TOKENS = 5

Made = tuple[str, Attention, list[Route], list[Missing]]


@dataclass(frozen=True, kw_only=True)
class MethodPreset:
    """A size; `make` gives its cases.

    Attributes:
        grid: Frames, height, width.
        heads: Of the attention.
        head_dim: Of a head.
        make: Called with the preset and the attention.
        batch: Of the tensors.
        window: Of windows around each query, or of boxes.
        special: Special tokens in front of every frame.
    """

    grid: Size
    heads: int
    head_dim: int
    make: Callable[[MethodPreset, Attention], Iterator[Made]]
    batch: int = 1
    window: Size = (1, 1, 1)
    special: int = 0

    @property
    def layout(self) -> TokenGrid:
        """Of the tokens."""
        frames, height, width = self.grid
        return TokenGrid(
            frames=frames, height=height, width=width, num_frame_prefix_tokens=self.special
        )

    def shrunk(self, factor: int) -> MethodPreset:
        """Height, width and windows divided."""
        frames, height, width = self.grid
        grid = (frames, max(8, height // factor), max(8, width // factor))
        inner = [max(2, n // factor) for n in self.window[1:]]
        return replace(self, grid=grid, window=(self.window[0], inner[0], inner[1]))


def t3_cases(preset: MethodPreset, attention: Attention) -> Iterator[Made]:
    """The layouts of the published cycle, beside rearranging the tokens."""
    for counts in CYCLE:
        pattern = boxes(preset.layout, counts)
        ours = pattern_route(attention, pattern)
        other = rearranged(GridProblem(attention=attention, pattern=pattern, ours=ours))
        missing = [other] if isinstance(other, Missing) else []
        routes = [ours] if isinstance(other, Missing) else [ours, other]
        yield f"t3 {'x'.join(map(str, counts))}", attention, routes, missing


def freeswim_cases(preset: MethodPreset, attention: Attention) -> Iterator[Made]:
    """The window branch, beside FlexAttention in raster order."""
    pattern = Neighborhood(layout=preset.layout, window_size=preset.window)
    ours = pattern_route(attention, pattern)
    other = flex_on_grid(GridProblem(attention=attention, pattern=pattern, ours=ours))
    assert isinstance(other, Route)  # noqa: S101 - the pattern is one mask
    yield "freeswim", attention, [ours, other], []


def msw_cases(preset: MethodPreset, attention: Attention) -> Iterator[Made]:
    """Windows of half a side, rolled by half of one."""
    shift = (0, preset.window[1] // 2, preset.window[2] // 2)
    pattern = Windows(layout=preset.layout, window_size=preset.window, shift=shift)
    yield "msw", attention, [pattern_route(attention, pattern)], []


def vggt_cases(preset: MethodPreset, attention: Attention) -> Iterator[Made]:
    """Pool, choose, attend, special tokens; then without the choice, and the choice alone."""
    for keep in VIEW_KEEPS:
        whole = _vggt_route(attention, preset.layout, BlockSparseConfig(keep=keep))
        yield f"vggt keep={keep:g}", attention, [whole, _without_choice(attention, whole, keep)], []


def _vggt_route(attention: Attention, layout: TokenGrid, config: BlockSparseConfig) -> Route:
    _, pattern = common.attend_by(config, attention, layout)
    return Route(
        name="retrofit",
        run=lambda: common.attend_by(config, attention, layout)[0],
        expected=attention.rows.expected(visible_by(pattern)),
        kept=pattern.keep(),
        details={"block_size": list(config.block_size), "keep_asked": config.keep},
    )


def _without_choice(attention: Attention, whole: Route, keep: float) -> Route:
    """Attention alone over the blocks of all tokens, special ones not treated apart."""
    query, key, value = attention.query, attention.key, attention.value
    size = (128, 64)
    mask = select_blocks(query, key, block_size=size, keep=keep)
    lists = lists_from_mask(mask, max_count=int(mask.sum(-1).max()))
    return replace(
        block_sparse_route(attention, mask, size),
        name="attention alone",
        run=lambda: block_sparse_attention(query, key, value, lists, block_size=size),
        details=whole.details,
    )


PRESETS = {
    "t3-4k": MethodPreset(grid=(21, 136, 240), heads=12, head_dim=128, make=t3_cases),
    "freeswim-1080p": MethodPreset(
        grid=(21, 68, 120), heads=12, head_dim=128, window=(21, 31, 53), make=freeswim_cases
    ),
    "freeswim-4k": MethodPreset(
        grid=(21, 136, 240), heads=12, head_dim=128, window=(21, 31, 53), make=freeswim_cases
    ),
    "vggt-100": MethodPreset(
        grid=(100, 37, 27), heads=16, head_dim=64, special=CAMERA_TOKENS, make=vggt_cases
    ),
    "msw-2k": MethodPreset(
        grid=(1, 128, 128), heads=10, head_dim=64, batch=2, window=(1, 64, 64), make=msw_cases
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser, devices=("cpu", "cuda"))
    parser.add_argument("--preset", default=",".join(PRESETS), help="by default all of them")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shrink", type=int, default=1, help="divides height, width and windows")
    options = parser.parse_args(arguments)
    names = common.read_list("preset", options.preset, common.known(PRESETS))
    dtypes = common.read_list("dtype", options.dtype, common.read_dtype)
    if options.shrink < 1:
        raise common.WrongOptionError(f"--shrink {options.shrink}: expected 1 or more.")
    machine = common.prepare(options)
    missing: dict[tuple[str, str], Missing] = {}
    is_right = is_first = True
    for name in names:
        for dtype in dtypes:
            for lines, absent in measure(name, dtype, options, machine):
                missing |= {(peer.name, peer.reason): peer for peer in absent}
                is_right &= not any(line.refused for line in lines if line.route == "retrofit")
                if options.json:
                    common.emit_all(machine, lines, absent)
                else:
                    print_rows(lines, header=is_first)
                is_first = False
    if not options.json:
        print_missing(list(missing.values()))
    common.print_clock(machine)
    return 0 if is_right else 1


def measure(
    name: str, dtype: torch.dtype, options: argparse.Namespace, machine: common.Machine
) -> Iterator[tuple[list[Line], list[Missing]]]:
    """The lines of one case after the other."""
    preset = PRESETS[name].shrunk(options.shrink) if options.shrink > 1 else PRESETS[name]
    frames, height, width = preset.grid
    shape = Shape(
        batch=preset.batch,
        heads=preset.heads,
        seq_len=frames * (height * width + preset.special),
        head_dim=preset.head_dim,
        dtype=dtype,
        device=machine.device,
    )
    attention = Attention(shape, machine.generator(), dense_rows=DENSE_TOKENS)
    for case, on, routes, absent in preset.make(preset, attention):
        lines: list[Line] = time_routes(
            f"{name} {case}",
            on,
            routes,
            rounds=options.rounds,
            base="cudnn" if machine.device == "cuda" else "sdpa",
        )
        yield lines, absent


if __name__ == "__main__":
    common.run_main(main)
