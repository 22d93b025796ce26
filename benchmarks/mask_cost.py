"""What choosing the blocks costs beside attending to them.

python -m benchmarks.mask_cost --device cpu --seq 16384 --heads 8
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import common
from benchmarks.choosing import TIES, attend, choose_slowly, disagreement, share_of
from retrofit.kernels import select_blocks
from retrofit.profiling.bench.attention import Attention, Shape
from retrofit.runtime.timing import Contender, Race, Spread, race

BLOCK_SIZE = (128, 64)


def measure(attention: Attention, keep: float, rounds: int | None) -> dict[str, Any]:
    """Our choice, one by PyTorch's `topk`, and the attention that follows, in one race."""
    query, key = attention.query, attention.key

    def choose() -> torch.Tensor:
        return select_blocks(query, key, block_size=BLOCK_SIZE, keep=keep)

    def choose_plainly() -> torch.Tensor:
        scores = _pool(query, BLOCK_SIZE[0]) @ _pool(key, BLOCK_SIZE[1]).transpose(-1, -2)
        chosen = scores.topk(max(1, int(scores.shape[-1] * keep)), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)

    expected = choose_slowly(query, key, BLOCK_SIZE, keep)

    def error(made: torch.Tensor) -> float:
        return disagreement(made, expected)

    contenders = [
        Contender(name="select_blocks", run=choose, error=error, tolerance=TIES),
        Contender(name="topk", run=choose_plainly, error=error, tolerance=10 * TIES),
        attend(attention, choose(), BLOCK_SIZE),
    ]
    result = race(contenders, rounds=rounds, device=attention.shape.device)
    return _line(attention, keep, result)


def _line(attention: Attention, keep: float, result: Race) -> dict[str, Any]:
    line: dict[str, Any] = {
        **attention.shape.to_dict(),
        "keep": keep,
        "block_size": list(BLOCK_SIZE),
        "load": list(result.load),
        "refused": result.refused,
        "errors": result.errors,
        "rounds": result.rounds,
        "seconds": {k: Spread(values=v).to_dict() for k, v in result.seconds.items()},
    }
    if "attend" in result.seconds:
        line["noisy"] = result.is_noisy("attend")
        names = [name for name in result.seconds if name != "attend"]
        line["share"] = {name: share_of(result, name).to_dict() for name in names}
    return line


def _pool(x: torch.Tensor, block: int) -> torch.Tensor:
    return x.unflatten(2, (-1, block)).mean(3, dtype=torch.float32)


def measure_all(options: argparse.Namespace, machine: common.Machine) -> Iterator[dict[str, Any]]:
    """A line for each dtype, length and fraction kept."""
    lengths = common.read_list("seq", options.seq, int)
    if any(length % BLOCK_SIZE[0] for length in lengths):
        raise common.WrongOptionError(f"--seq {options.seq}: expected multiples of 128.")
    for dtype in common.read_list("dtype", options.dtype, common.read_dtype):
        for length in lengths:
            shape = Shape(
                heads=options.heads,
                seq_len=length,
                head_dim=options.head_dim,
                dtype=dtype,
                device=machine.device,
            )
            attention = Attention(shape, machine.generator(length))
            for keep in common.read_list("keep", options.keep, float):
                yield measure(attention, keep, options.rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mask_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser, devices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--seq", default="16384")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--keep", default="0.1")
    options = parser.parse_args(arguments)
    machine = common.prepare(options)
    lines = measure_all(options, machine)
    return common.report(lines, machine, None if options.json else _as_text)


def _as_text(line: dict[str, Any]) -> str:
    head = f"{line['dtype']:<9} N={line['seq_len']} H={line['heads']} keep={line['keep']:g}"
    if line["refused"]:
        return f"{head} not timed: {line['refused']}"
    ms = {name: 1000 * spread["median"] for name, spread in line["seconds"].items()}
    shares = line["share"]
    return (
        f"{head}  attend {ms['attend']:.1f} ms, select_blocks {ms['select_blocks']:.2f} ms "
        f"({shares['select_blocks']['median']:.2%} of both), plain topk {ms['topk']:.2f} ms "
        f"({shares['topk']['median']:.2%}), load {line['load'][1]}"
        f"{', noisy' if line['noisy'] else ''}"
    )


if __name__ == "__main__":
    common.run_main(main)
