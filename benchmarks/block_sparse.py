r"""Block-sparse attention over random block lists, beside dense and beside other people's.

python -m benchmarks.block_sparse --device cpu --dtype float32,bfloat16 --seq 8192,16384 \
    --heads 8,4 --block 64,128 --keep 0.05,0.1,0.25,0.5,1.0 --against sdpa,flex,gather,row_loop

Efficiency is dense time x kept / sparse time: 1.0 saves every skipped pair in full. Every route
gets the same lists; an output that is not right is not timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence

import torch

from benchmarks import common
from benchmarks.peers import BLOCK_PEERS, BlockProblem, Missing, block_peers
from benchmarks.tables import print_missing, print_rows
from retrofit.kernels import backends
from retrofit.profiling.bench.attention import Attention, Shape
from retrofit.profiling.bench.checking import ROUNDED_SCORES
from retrofit.profiling.bench.lines import Line, time_routes
from retrofit.profiling.bench.patterns import block_sparse_route, draw_block_mask

AGAINST = {
    "cpu": "sdpa,flex,gather,row_loop",
    "cuda": "sdpa,flex,flex_autotuned,flex_flash,sparge,block_sparse_attn,flashinfer",
}
BASES = ("sdpa", "cudnn")


def measure(
    options: argparse.Namespace, machine: common.Machine
) -> Iterator[tuple[list[Line], list[Missing]]]:
    """The lines of one case after the other."""
    against = _read_against(options, machine.device)
    lengths = common.read_list("seq", options.seq, int)
    heads = common.read_list("heads", options.heads, int)
    if len(heads) not in (1, len(lengths)):
        raise common.WrongOptionError(
            f"--heads {options.heads}: expected one number, or one for each of --seq {options.seq}."
        )
    heads = heads * len(lengths) if len(heads) == 1 else heads
    dtypes = common.read_list("dtype", options.dtype, common.read_dtype)
    dims = common.read_list("head-dim", options.head_dim, int)
    blocks = common.read_list("block", options.block, int)
    keeps = common.read_list("keep", options.keep, float)
    for dtype, (seq_len, num_heads), dim in itertools.product(
        dtypes, zip(lengths, heads, strict=True), dims
    ):
        shape = Shape(
            heads=num_heads, seq_len=seq_len, head_dim=dim, dtype=dtype, device=machine.device
        )
        attention = Attention(shape, machine.generator(seq_len))
        for block, keep in itertools.product(blocks, keeps):
            yield _measure_one(attention, block, keep, against, options.rounds, machine)


def _measure_one(
    attention: Attention,
    block: int,
    keep: float,
    against: Sequence[str],
    rounds: int | None,
    machine: common.Machine,
) -> tuple[list[Line], list[Missing]]:
    shape, size = attention.shape, (block, block)
    mask = draw_block_mask(shape.heads, shape.seq_len, size, keep, machine.generator(block))
    answers = backends("block_sparse_attention", device=machine.device, dtype=shape.dtype)
    rounds_scores = shape.dtype == torch.bfloat16 and not (
        answers["triton"][0] or answers["native"][0]
    )
    ours = block_sparse_route(
        attention, mask, size, tolerance=ROUNDED_SCORES if rounds_scores else None
    )
    problem = BlockProblem(
        attention=attention, block_mask=mask.to(shape.device), block_size=size, ours=ours
    )
    peers = block_peers(problem, [name for name in against if name not in BASES])
    routes = [peer for peer in peers if not isinstance(peer, Missing)]
    lines = time_routes(
        f"blk{block} keep={keep:g}",
        attention,
        [ours, *routes],
        rounds=rounds,
        base="cudnn" if shape.device == "cuda" else "sdpa",
    )
    return lines, [peer for peer in peers if isinstance(peer, Missing)]


def _read_against(options: argparse.Namespace, device: str) -> list[str]:
    names: list[str] = common.read_list("against", options.against or AGAINST[device], str)
    unknown = [name for name in names if name not in (*BLOCK_PEERS, *BASES)]
    if unknown:
        raise common.WrongOptionError(
            f"--against {options.against}: no {', '.join(unknown)}. "
            f"Known: {', '.join((*BASES, *BLOCK_PEERS))}."
        )
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.block_sparse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser, devices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--seq", default="8192", help="tokens")
    parser.add_argument("--heads", default="4", help="one number, or one for each of --seq")
    parser.add_argument("--head-dim", default="64")
    parser.add_argument("--block", default="64,128", help="query and key tokens of a block")
    parser.add_argument("--keep", default="0.05,0.1,0.25,0.5,1.0")
    parser.add_argument(
        "--against", help=f"by default {AGAINST['cpu']}; on a GPU {AGAINST['cuda']}"
    )
    options = parser.parse_args(arguments)
    machine = common.prepare(options)
    missing: dict[tuple[str, str], Missing] = {}
    is_right = is_first = True
    for lines, absent in measure(options, machine):
        missing |= {(peer.name, peer.reason): peer for peer in absent}
        is_right = is_right and not any(line.refused for line in lines if line.route == "retrofit")
        if not options.json:
            print_rows(lines, header=is_first)
        else:
            common.emit_all(machine, lines, absent)
        is_first = False
    if not options.json:
        print_missing(list(missing.values()))
    common.print_clock(machine)
    return 0 if is_right else 1


if __name__ == "__main__":
    common.run_main(main)
