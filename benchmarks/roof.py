"""What one core could do at most, beside what dense attention and our kernel do.

python -m benchmarks.roof

The roof is a loop of multiply-adds (in bfloat16 of dot products) in registers: no loads, no
softmax. No kernel's efficiency against PyTorch's attention can exceed `roof / sdpa`, at any
fraction kept; the goals C1, C2 and C4 are to be read beside that.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import common
from retrofit.kernels import block_sparse_attention
from retrofit.kernels._native import load_library
from retrofit.runtime.timing import Contender, Spread, race

SOURCE = Path(__file__).parent / "roof.c"
ROUNDS = 5_000_000  # of the loop: a quarter of a second
HEADS, HEAD_DIM, BLOCK = 2, 64, 64
TOLERANCE = 1e-2  # of our output against PyTorch's; correctness has its own tests


def measure(library: ctypes.CDLL, dtype: str, tokens: int, rounds: int | None) -> dict[str, Any]:
    """The loop, dense attention and our kernel with every block kept, timed in turn."""
    loop = getattr(library, f"roof_{dtype}")
    loop.argtypes, loop.restype = (ctypes.c_int64,), ctypes.c_int64
    size = (1, HEADS, tokens, HEAD_DIM)
    query, key, value = (torch.randn(size).to(common.read_dtype(dtype)) for _ in range(3))
    blocks = -(-tokens // BLOCK)
    everything = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    expected = scaled_dot_product_attention(query, key, value)

    def attend() -> Tensor:
        return block_sparse_attention(query, key, value, everything, block_size=(BLOCK, BLOCK))

    def error(out: Tensor) -> float:
        return float((out - expected).norm() / expected.norm())

    found = race(
        [
            Contender(name="roof", run=lambda: loop(ROUNDS)),
            Contender(name="sdpa", run=lambda: scaled_dot_product_attention(query, key, value)),
            Contender(name="retrofit", run=attend, error=error, tolerance=TOLERANCE),
        ],
        rounds=rounds,
    )
    work = 4 * HEADS * HEAD_DIM * tokens**2
    done = {"roof": loop(1) * ROUNDS, "sdpa": work, "retrofit": work}
    rates = {
        name: Spread(values=tuple(done[name] / 1e9 / second for second in seconds)).median
        for name, seconds in found.seconds.items()
    }
    return {
        "case": f"{dtype} N={tokens} keep=1 (dense)",
        **{f"{name}_gflops": rate for name, rate in rates.items()},
        "highest_speed": rates["roof"] / rates["sdpa"],
        "speed": found.speed("retrofit", "sdpa").median if "retrofit" in rates else None,
        "refused": dict(found.refused),
        "load": found.load[0],
    }


def main() -> int:
    """Measure both dtypes on one pinned thread."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_options(parser)
    parser.add_argument("--seq", type=int, default=8192, help="tokens")
    options = parser.parse_args()
    machine = common.prepare(options)
    library, reason = load_library(SOURCE)
    if library is None:
        raise common.WrongOptionError(f"the loop can't be compiled: {reason}.")
    for dtype in ("float32", "bfloat16"):
        line = measure(library, dtype, options.seq, options.rounds)
        if options.json:
            common.emit({**line, **machine.to_dict()})
        elif not line["highest_speed"]:
            print(f"{line['case']}: this processor has no instructions for it")
        elif line["refused"]:
            print(f"{line['case']}: {line['refused']}")
        else:
            print(
                f"{line['case']}: roof {line['roof_gflops']:.0f} GFLOP/s, PyTorch's attention "
                f"{line['sdpa_gflops']:.0f}, ours {line['retrofit_gflops']:.0f}: "
                f"{line['speed']:.2f}x of at most {line['highest_speed']:.2f}x"
            )
    return 0


if __name__ == "__main__":
    common.run_main(main)
