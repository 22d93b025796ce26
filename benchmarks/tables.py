"""Lines of a benchmark for people."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers import Missing
from retrofit.profiling.bench.lines import Line

HEADER = (
    f"{'case':<26} {'route':<16} {'dtype':<9} {'tokens':>7} {'D':>4} {'kept':>6} {'ms':>9} "
    f"{'speed':>7} {'min':>7} {'max':>7} {'effic.':>7} {'TFLOP/s':>8} {'error':>8} {'list':>6} "
    f"{'full':>5} {'first s':>8} {'load':>5}"
)


def print_rows(lines: Sequence[Line], *, header: bool = True) -> None:
    """A block of the table; speed is that against the dense route, of the same round."""
    if header:
        print(HEADER)
    for line in lines:
        print(_row(line), flush=True)


def _row(line: Line) -> str:
    dtype = str(line.shape.dtype).removeprefix("torch.")
    head = f"{line.case:<26} {line.route:<16} {dtype:<9} {line.shape.seq_len:>7} "
    head += f"{line.shape.head_dim:>4} {line.kept:>6.3f} "
    if line.seconds is None or line.speed is None or line.efficiency is None:
        return f"{head}not timed: {line.refused}"
    speed = line.speed
    listed, full = line.details.get("list_mean"), line.details.get("list_full_fraction")
    return (
        f"{head}{line.seconds.median * 1000:>9.2f} {speed.median:>7.2f} {min(speed.values):>7.2f} "
        f"{max(speed.values):>7.2f} {line.efficiency.median:>7.2f} {line.tflops or 0:>8.3f} "
        f"{line.error or 0:>8.1e} {_number(listed):>6} {_number(full):>5} "
        f"{line.first_seconds:>8.2f} {line.load[1]!s:>5}"
        f"{' noisy' if line.noisy else ''}{'  slower than dense' if speed.median < 1 else ''}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def print_missing(peers: Sequence[Missing]) -> None:
    """What could not run, and why."""
    for peer in peers:
        print(f"missing: {peer.name}: {peer.reason}")
