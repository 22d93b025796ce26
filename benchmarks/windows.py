"""Windows of a token grid, beside dense and beside other people's.

python -m benchmarks.windows --device cpu --preset t3-small,inward-small,msw-small

FlexAttention gets the pattern as a mask over tokens in raster order, as its users write it;
`rearrange` moves boxes into the batch and calls PyTorch's attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks import common
from benchmarks.grid_peers import GridProblem, flex_on_grid, natten_on_grid, rearranged
from benchmarks.peers import Missing
from benchmarks.tables import print_missing, print_rows
from retrofit.layout.grid import TokenGrid
from retrofit.methods.t3 import boxes
from retrofit.patterns import Neighborhood, Pattern, Windows
from retrofit.profiling.bench.attention import Attention, Shape
from retrofit.profiling.bench.lines import Line, time_routes
from retrofit.profiling.bench.patterns import Size, pattern_route

PEERS = {"flex": flex_on_grid, "natten": natten_on_grid, "rearrange": rearranged}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One pattern of a preset.

    Attributes:
        kind: `inward` windows around each query, `boxes` rolled by half of one, or a cut of `t3`.
        window: Keys on each axis; for `t3` how many boxes.
    """

    kind: Literal["inward", "boxes", "t3"]
    window: Size

    def on(self, layout: TokenGrid) -> Pattern:
        """The pattern on a grid."""
        window = self.window
        if self.kind == "inward":
            return Neighborhood(layout=layout, window_size=window)
        if self.kind == "boxes":
            shift = (0, window[1] // 2, window[2] // 2)
            return Windows(layout=layout, window_size=window, shift=shift)
        return boxes(layout, window)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A shape and its patterns."""

    grid: Size
    heads: int
    head_dim: int
    patterns: tuple[Choice, ...]


PRESETS = {
    "t3-small": Preset(
        grid=(4, 32, 32),
        heads=4,
        head_dim=64,
        patterns=tuple(
            Choice(kind="t3", window=counts) for counts in ((4, 1, 1), (1, 4, 4), (2, 2, 2))
        ),
    ),
    "inward-small": Preset(
        grid=(21, 24, 40),
        heads=2,
        head_dim=64,
        patterns=(Choice(kind="inward", window=(21, 11, 17)),),
    ),
    "msw-small": Preset(
        grid=(1, 64, 64),
        heads=8,
        head_dim=64,
        patterns=(Choice(kind="boxes", window=(1, 32, 32)),),
    ),
}


def measure(
    preset: Preset, name: str, shape: Shape, options: argparse.Namespace, machine: common.Machine
) -> Iterator[tuple[list[Line], list[Missing]]]:
    """The lines of one pattern after the other."""
    attention = Attention(shape, machine.generator(shape.seq_len))
    for choice in preset.patterns:
        problem = make(attention, preset.grid, choice)
        peers = [PEERS[peer](problem) for peer in options.peers]
        routes = [peer for peer in peers if not isinstance(peer, Missing)]
        lines = time_routes(
            f"{name} {'x'.join(map(str, choice.window))}",
            attention,
            [problem.ours, *routes],
            rounds=options.rounds,
            base="cudnn" if shape.device == "cuda" else "sdpa",
        )
        yield lines, [peer for peer in peers if isinstance(peer, Missing)]


def make(attention: Attention, grid: Size, choice: Choice) -> GridProblem:
    """The pattern on a grid with our route, for the peers."""
    frames, height, width = grid
    pattern = choice.on(TokenGrid(frames=frames, height=height, width=width))
    ours = pattern_route(attention, pattern)
    return GridProblem(attention=attention, pattern=pattern, ours=ours)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.windows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser, devices=("cpu", "cuda"))
    parser.add_argument("--preset", default=",".join(PRESETS), help="by default all of them")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--against", default=",".join(PEERS))
    options = parser.parse_args(arguments)
    names = common.read_list("preset", options.preset, common.known(PRESETS))
    options.peers = common.read_list("against", options.against, common.known(PEERS))
    dtypes = common.read_list("dtype", options.dtype, common.read_dtype)
    machine = common.prepare(options)
    missing: dict[tuple[str, str], Missing] = {}
    is_right = is_first = True
    for name in names:
        preset: Preset = PRESETS[name]
        grid = preset.grid
        for dtype in dtypes:
            shape = Shape(
                heads=preset.heads,
                seq_len=grid[0] * grid[1] * grid[2],
                head_dim=preset.head_dim,
                dtype=dtype,
                device=machine.device,
            )
            for lines, absent in measure(preset, name, shape, options, machine):
                missing |= {(peer.name, peer.reason): peer for peer in absent}
                is_right &= not any(line.refused for line in lines if line.route == "retrofit")
                common.emit_all(machine, lines, absent) if options.json else print_rows(
                    lines, header=is_first
                )
                is_first = False
    if not options.json:
        print_missing(list(missing.values()))
    common.print_clock(machine)
    return 0 if is_right else 1


if __name__ == "__main__":
    common.run_main(main)
