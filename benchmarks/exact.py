"""From how many tokens on `exact` is faster than PyTorch's attention, nothing left out.

python -m benchmarks.exact --seq 64,128,256,512,1024,4096
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import common
from retrofit.layout.grid import TokenGrid
from retrofit.patterns import AttentionCall, Everything, attend
from retrofit.profiling.bench.attention import Attention, Shape
from retrofit.runtime.timing import Contender, Spread, race

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MASKS = ("none", "causal", "padded")  # a sixteenth of the keys hidden


def measure(attention: Attention, mask: str, rounds: int | None) -> dict[str, Any]:
    """Both in one race, each held against float64."""
    query, key, value = attention.query, attention.key, attention.value
    length = query.shape[2]
    shown = None
    if mask == "padded":
        shown = torch.arange(length).lt(length - length // 16).view(1, 1, 1, -1)
    is_causal = mask == "causal"
    call = AttentionCall(
        query=query, key=key, value=value, attn_mask=shown, is_causal=is_causal
    ).with_full_mask()
    everything = Everything(layout=TokenGrid(width=length))
    wide = (x.double() for x in (query, key, value))
    expected = scaled_dot_product_attention(*wide, call.attn_mask, 0.0, is_causal)

    def error(made: torch.Tensor) -> float:
        return float((made - expected).abs().max() / expected.abs().max())

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, call.attn_mask, 0.0, is_causal)

    def exact() -> torch.Tensor:
        out: torch.Tensor = attend(call, everything)
        return out

    bound = TOLERANCES[query.dtype]
    result = race(
        [
            Contender(name="dense", run=dense, error=error, tolerance=bound),
            Contender(name="exact", run=exact, error=error, tolerance=bound),
        ],
        rounds=rounds,
        device=attention.shape.device,
    )
    line: dict[str, Any] = {
        **attention.shape.to_dict(),
        "mask": mask,
        "load": list(result.load),
        "refused": result.refused,
        "rounds": result.rounds,
        "errors": result.errors,
        "seconds": {k: Spread(values=v).to_dict() for k, v in result.seconds.items()},
    }
    if not result.refused:
        line["speed"] = result.speed("exact", "dense").to_dict()
        line["noisy"] = result.is_noisy("dense")
    return line


def measure_all(options: argparse.Namespace, machine: common.Machine) -> Iterator[dict[str, Any]]:
    """A line for each dtype, mask and length."""
    for dtype in common.read_list("dtype", options.dtype, common.read_dtype):
        for mask in common.read_list("mask", options.mask, common.known(MASKS)):
            for length in common.read_list("seq", options.seq, int):
                shape = Shape(
                    heads=options.heads,
                    seq_len=length,
                    head_dim=options.head_dim,
                    dtype=dtype,
                    device=machine.device,
                )
                attention = Attention(shape, machine.generator(length))
                yield measure(attention, mask, options.rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--mask", default="none,causal")
    parser.add_argument("--seq", default="64,128,256,512,1024,4096")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    options = parser.parse_args(arguments)
    machine = common.prepare(options)
    lines = measure_all(options, machine)
    return common.report(lines, machine, None if options.json else _as_text)


def _as_text(line: dict[str, Any]) -> str:
    head = f"{line['dtype']:<9} {line['mask']:<7} N={line['seq_len']:<6}"
    if line["refused"]:
        return f"{head} not timed: {line['refused']}"
    ms = {name: 1000 * spread["median"] for name, spread in line["seconds"].items()}
    speed = line["speed"]
    return (
        f"{head} dense {ms['dense']:8.3f} ms, exact {ms['exact']:8.3f} ms: "
        f"{speed['median']:.2f}x ({speed['min']:.2f} to {speed['max']:.2f}), load "
        f"{line['load'][1]}{', noisy' if line['noisy'] else ''}"
    )


if __name__ == "__main__":
    common.run_main(main)
