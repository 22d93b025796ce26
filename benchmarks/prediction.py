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
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import common, models, quick, windows
from retrofit.bench.attention import Attention, Shape
from retrofit.cost.network_plan import cost_of
from retrofit.cost.rates import measure_rates
from retrofit.cost.trace import Trace, tracing
from retrofit.grid import TokenGrid
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.patching import patch
from retrofit.run_state import RunState
from retrofit.sites import AttentionSite
from retrofit.timing import Contender, Race, Spread, load_average, race

CLOSE = 0.25
ROUNDS = 5
BLOCKS = "block-sparse"  # of benchmarks.quick's shape: choosing the blocks, and attending to them


def presets() -> tuple[str, ...]:
    """Names of everything that can be predicted and measured."""
    return (*windows.PRESETS, BLOCKS, *models.PRESETS)


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
        for pattern in preset.patterns:
            case = "x".join(map(str, pattern.window))
            runs[case] = windows.make(attention, preset.grid, pattern)[0].run
    traces = {
        case: _trace(functools.partial(_on_meta, run, attention, on_meta))
        for case, run in runs.items()
    }
    yield from _lines(name, dtype, traces, runs, options)


def _block_runs(attention: Attention) -> dict[str, Callable[[], Any]]:
    """The method's operator, as a patched layer of this shape calls it."""
    shape = attention.shape
    site = AttentionSite(
        path="attn",
        index=0,
        block=0,
        kind="self",
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        grid_source="",
    )

    def run(block: int, keep: float) -> Any:
        config = BlockSparseConfig(keep=keep, block_size=(block, block))
        operator = config.build(site, TokenGrid(width=shape.seq_len), RunState())
        query, key, value = attention.query, attention.key, attention.value
        return operator(query, key, value, attn_mask=None, is_causal=False, scale=None)

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
    """A preset of `benchmarks.models`, dense and with each of its patches."""
    preset = models.PRESETS[name]
    with torch.device("meta"):
        empty = preset.build().eval().to(dtype)
    inputs = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in preset.inputs(dtype).items()
    }
    traces = {}
    with tracing(empty) as traces["dense"]:
        empty(**inputs)
    for label, recipe in preset.variants.items():
        with patch(empty, recipe) as handle:
            handle.at_step(preset.step, models.STEPS)
            with tracing(empty) as traces[label]:
                empty(**inputs)
    model = preset.build().eval().to(dtype)
    real = preset.inputs(dtype)

    def run(label: str) -> Any:
        if label == "dense":
            return model(**real)
        with patch(model, preset.variants[label]) as handle:
            handle.at_step(preset.step, models.STEPS)
            return model(**real)

    runs = {label: (lambda label=label: run(label)) for label in traces}
    yield from _lines(name, dtype, traces, runs, options)


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
            "off": predicted[name] / measured - 1,
            "is_close": abs(predicted[name] / measured - 1) <= CLOSE,
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
        default=",".join((*windows.PRESETS, BLOCKS, "sd15-512")),
        help=", ".join(presets()),
    )
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    names = common.read_list("preset", options.preset, common.known(presets()))
    dtypes = common.read_list("dtype", options.dtype, common.read_dtype)
    machine = common.prepare(options)
    are_close = True
    for name in names:
        measure = networks if name in models.PRESETS else operators
        for dtype in dtypes:
            for line in measure(name, dtype, options):
                are_close = are_close and line["is_close"]
                if options.json:
                    common.emit({**line, **machine.to_dict()})
                else:
                    print(_as_text(line), flush=True)
    return 0 if are_close else 1


def _as_text(line: dict[str, Any]) -> str:
    return (
        f"{line['preset']:<16} {line['case']:<22} {line['dtype']:<9} "
        f"predicted {line['predicted_seconds']:8.3f} s, measured {line['measured_seconds']:8.3f} s "
        f"({line['off']:+.0%}); speed {line['predicted_speed']:.2f}x, "
        f"{line['measured_speed']:.2f}x; load {line['load'][1]}"
        f"{', noisy' if line['noisy'] else ''}{'' if line['is_close'] else '  OFF'}"
    )


if __name__ == "__main__":
    common.run_main(main)
