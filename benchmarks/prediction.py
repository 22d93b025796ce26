"""What `retrofit plan` predicts against what is then measured.

python -m benchmarks.prediction --preset t3-small,inward-small,msw-small,block-sparse,sd15-512

Each preset is predicted and measured dense and patched, one right after the other in one process;
a prediction is good if it is within 25% of the measurement.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import common, planned, quick, windows
from retrofit.layout.grid import TokenGrid
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.profiling.bench.attention import Attention, Shape
from retrofit.profiling.cost.network_plan import cost_of
from retrofit.profiling.cost.rates import measure_rates
from retrofit.profiling.cost.trace import Trace, tracing
from retrofit.runtime.machine import load_average
from retrofit.runtime.timing import Contender, Race, Spread, race

CLOSE = 0.25
ROUNDS = 5
BLOCKS = "block-sparse"  # of benchmarks.quick's shape: choosing the blocks, and attending to them


def presets() -> tuple[str, ...]:
    """Names of everything that can be predicted and measured."""
    return (*windows.PRESETS, BLOCKS, *planned.PRESETS)


def predict(traces: dict[str, Trace]) -> dict[str, float]:
    """Seconds by name."""
    rates = measure_rates(traces.values(), "cpu")
    return {name: cost_of([(trace, 1)], rates).total for name, trace in traces.items()}


def operators(name: str, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Any]:
    """Patterns of a preset of `benchmarks.windows`, or `BLOCKS`, beside dense attention."""
    preset = None if name == BLOCKS else windows.PRESETS[name]
    shape = Shape(
        heads=quick.HEADS if preset is None else preset.heads,
        seq_len=quick.SEQ_LEN if preset is None else math.prod(preset.grid),
        head_dim=64 if preset is None else preset.head_dim,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(0)
    attention, on_meta = Attention(shape, generator), Attention(shape, generator)
    on_meta.query, on_meta.key, on_meta.value = (
        x.to("meta") for x in (on_meta.query, on_meta.key, on_meta.value)
    )
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: scaled_dot_product_attention(
            attention.query, attention.key, attention.value
        )
    }
    if preset is None:
        runs |= _block_runs(attention)
    else:
        for choice in preset.patterns:
            case = "x".join(map(str, choice.window))
            runs[case] = windows.make(attention, preset.grid, choice).ours.run
    traces = {
        case: _trace(functools.partial(_on_meta, run, attention, on_meta))
        for case, run in runs.items()
    }
    yield from _lines(name, dtype, traces, runs, options)


def _block_runs(attention: Attention) -> dict[str, Callable[[], Any]]:
    """The method, as a patched layer of this shape runs it."""
    layout = TokenGrid(width=attention.shape.seq_len)

    def run(block: int, keep: float) -> Any:
        config = BlockSparseConfig(keep=keep, block_size=(block, block))
        return common.attend_by(config, attention, layout)

    return {
        f"blk{block} keep={keep:g}": functools.partial(run, block, keep)
        for block in quick.BLOCKS
        for keep in quick.KEEPS
    }


def _on_meta(run: Callable[[], Any], attention: Attention, on_meta: Attention) -> None:
    """Run a route, which reads the tensors of `attention` when it is called, on meta."""
    kept = attention.query, attention.key, attention.value
    attention.query, attention.key, attention.value = on_meta.query, on_meta.key, on_meta.value
    try:
        run()
    finally:
        attention.query, attention.key, attention.value = kept


def _trace(run: Callable[[], Any]) -> Trace:
    with tracing(nn.Module()) as trace:
        run()
    return trace


def networks(name: str, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Any]:
    """A preset of `benchmarks.planned`: time and peak memory, dense and patched."""
    before = load_average()
    folder = None if options.folder is None else options.folder / name
    found = list(
        planned.predict_and_measure(planned.PRESETS[name], dtype, options.rounds or ROUNDS, folder)
    )
    dense = found[0]
    for line in found:
        yield {
            "preset": name,
            "dtype": str(dtype).removeprefix("torch."),
            **line,
            **_compare(line["predicted_seconds"], line["measured_seconds"]),
            "memory": _compare(line["predicted_peak_bytes"], line["measured_peak_bytes"]),
            "measured_speed": dense["measured_seconds"] / line["measured_seconds"],
            "load": [before, load_average()],
            "rounds": options.rounds or ROUNDS,
        }


def _compare(predicted: float, measured: float | None) -> dict[str, Any]:
    """By how much a prediction is off."""
    if not measured:
        return {"off": None, "is_close": True}
    off = predicted / measured - 1
    return {"off": off, "is_close": abs(off) <= CLOSE}


def _lines(
    preset: str,
    dtype: torch.dtype,
    traces: dict[str, Trace],
    runs: dict[str, Callable[[], Any]],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    before = load_average()
    predicted = predict(traces)
    contenders = [Contender(name=name, run=run) for name, run in runs.items()]
    with torch.no_grad():
        result: Race = race(contenders, rounds=options.rounds or ROUNDS)
    for name in runs:
        measured = Spread(values=result.seconds[name]).median
        yield {
            "preset": preset,
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "predicted_seconds": predicted[name],
            "measured_seconds": measured,
            **_compare(predicted[name], measured),
            "predicted_speed": predicted["dense"] / predicted[name],
            "measured_speed": result.speed(name, "dense").median,
            "noisy": result.is_noisy("dense"),
            "load": [before, result.load[1]],
            "rounds": result.rounds,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each case; 1 if any prediction is off by more than 25%."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prediction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser)
    parser.add_argument(
        "--preset",
        default=",".join((*windows.PRESETS, BLOCKS, "minilm-512")),
        help=", ".join(presets()),
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--folder", type=Path, help="where the networks' folders stay; thrown away by default"
    )
    options = parser.parse_args(arguments)
    names = common.read_list("preset", options.preset, common.known(presets()))
    dtypes = common.read_list("dtype", options.dtype, common.read_dtype)
    machine = common.prepare(options)
    are_close = True
    for name in names:
        measure = networks if name in planned.PRESETS else operators
        for dtype in dtypes:
            for line in measure(name, dtype, options):
                are_close = are_close and line["is_close"]
                are_close = are_close and line.get("memory", line)["is_close"]
                if options.json:
                    common.emit({**line, **machine.to_dict()})
                else:
                    print(_as_text(line), flush=True)
    return 0 if are_close else 1


def _as_text(line: dict[str, Any]) -> str:
    text = (
        f"{line['preset']:<12} {line['case']:<18} {line['dtype']:<8} "
        f"predicted {line['predicted_seconds']:7.3f} s, measured {line['measured_seconds']:7.3f} s "
        f"({line['off']:+.0%}); speed {line['predicted_speed']:.2f}x, "
        f"{line['measured_speed']:.2f}x; "
    )
    if line.get("measured_peak_bytes"):
        sizes = (line[f"{key}_peak_bytes"] / 1e6 for key in ("predicted", "measured"))
        text += "memory {:.1f} MB, {:.1f} MB ({:+.0%}); ".format(*sizes, line["memory"]["off"])
    is_close = line["is_close"] and line.get("memory", line)["is_close"]
    noisy = ", noisy" if line.get("noisy") else ""
    return f"{text}load {line['load'][1]}{noisy}{'' if is_close else '  OFF'}"


if __name__ == "__main__":
    common.run_main(main)
