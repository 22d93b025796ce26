"""Block-sparse global attention of VGGT-1B's shape, and a whole forward pass of its widths.

python -m benchmarks.views --frames 8 16 --heads 2
python -m benchmarks.views --forward --layers 1 --frames 8 --clock cpu

Dense and patched run in turn in one process. The share of block prediction is timed by itself.
Heads are independent of each other: fewer of them give the same ratios in less time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import common
from retrofit.architectures.vggt import VGGT
from retrofit.layout.grid import TokenGrid
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.run_state import RunState
from retrofit.patching.patch import patch
from retrofit.patterns import AttentionCall
from retrofit.runtime.machine import load_average
from retrofit.runtime.timing import Contender, Race, race

KEEPS = (0.5, 0.25)
HEAD_DIM = 64
SIZE = (37, 28)  # patches of 14 pixels: 518 x 392


def attention(
    frames: int, heads: int, dtype: torch.dtype, rounds: int, clock: common.Clock
) -> None:
    """One global attention call, dense, sparse, and the choice of blocks alone."""
    height, width = SIZE
    grid = TokenGrid(frames=frames, height=height, width=width, num_frame_prefix_tokens=5)
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, grid.num_tokens, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    given = (
        common.lone_site(heads, HEAD_DIM),
        grid,
        AttentionCall(query=query, key=key, value=value),
        RunState(),
    )
    contenders = [
        Contender(name="dense", run=lambda: scaled_dot_product_attention(query, key, value))
    ]
    for keep in KEEPS:
        method = BlockSparseConfig(keep=keep)
        contenders += [
            Contender(
                name=f"keep {keep}",
                run=lambda method=method: method.attend(*given)[0],
            ),
            Contender(
                name=f"choosing {keep}",
                run=lambda method=method: method.pattern(*given),
            ),
        ]
    with torch.no_grad():
        found = race(contenders, rounds=rounds, clock=clock)
    print(f"{frames} frames, {grid.num_tokens} tokens, {heads} heads of {HEAD_DIM}, {dtype}")
    _show(found)


def forward(
    frames: int, layers: int, dtype: torch.dtype, rounds: int, clock: common.Clock, *, depth: bool
) -> None:
    """A VGGT of 1B's widths with fewer layers, camera and depth head."""
    config: dict[str, Any] = {
        "aggregator": {"depth": layers},
        "dino": {"depth": layers},
        "camera_head": {"trunk_depth": 1},
    }
    if depth:
        config["depth_head"] = {"intermediate_layer_idx": [0, 0, layers - 1, layers - 1]}
    model = VGGT.from_config(config).eval()
    model.aggregator.to(dtype)
    images = torch.rand(1, frames, 3, SIZE[0] * 14, SIZE[1] * 14)

    def run(keep: float | None) -> Any:
        if keep is None:
            return model(images)
        with patch(model, BlockSparseConfig(keep=keep)):
            return model(images)

    contenders = [Contender(name="dense", run=lambda: run(None))]
    contenders += [Contender(name=f"keep {k}", run=lambda k=k: run(k)) for k in KEEPS]
    with torch.inference_mode():
        found = race(contenders, rounds=rounds, clock=clock)
    print(
        f"forward, {layers} of 24 layers, {frames} frames of 518x392, {dtype}, depth head: {depth}"
    )
    _show(found)


def _show(found: Race) -> None:
    print(f"load {found.load[0]} to {found.load[1]}, {found.rounds} rounds")
    for name, seconds in found.seconds.items():
        speed = found.speed(name, "dense")
        spread = f"{speed.median:.2f}x ({min(speed.values):.2f} to {max(speed.values):.2f})"
        share = f", {1 / speed.median:.1%} of dense" if name.startswith("choosing") else ""
        print(f"  {name}: {min(seconds):.3f} s at best, {spread}{share}", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--forward", action="store_true", help="the whole forward pass instead")
    parser.add_argument("--layers", type=int, default=2, help="of the forward pass")
    parser.add_argument(
        "--without-depth", action="store_true", help="leave out the head that no patch changes"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    common.add_clock(parser)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    clock = common.read_clock(arguments.clock, arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, load {load_average()}")
    depth = not arguments.without_depth
    for frames in arguments.frames:
        if arguments.forward:
            forward(frames, arguments.layers, dtype, arguments.rounds, clock, depth=depth)
        else:
            attention(frames, arguments.heads, dtype, arguments.rounds, clock)
    return 0


if __name__ == "__main__":
    common.run_main(main)
