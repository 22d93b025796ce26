r"""Measure the small VGGT on unseen rooms: dense, and with block-sparse global attention.

    python examples/rooms/evaluate.py --scenes 16 --views 8 16 32
    python examples/rooms/evaluate.py --views 16 --orders raster --keeps 0.5 --layer-keep

Prints Markdown tables. Scenes are drawn from seeds that training never uses.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from render import render_views
from train import HELD_OUT, SIZE

from retrofit.architectures.vggt import VGGT
from retrofit.compare.views import TrueViews, ViewRow, compare_views, true_rotations
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.recipe import Recipe

MODEL = Path(__file__).resolve().parent / "model"
COLUMNS = ("abs_rel", "points", "rotation", "translation", "rra@5", "rra@15", "rta@5", "rta@15")


def draw_truth(seed: int, scenes: int, views: int) -> TrueViews:
    """Unseen rooms with everything known about them."""
    drawn = render_views(HELD_OUT + seed, scenes, views, SIZE)
    return TrueViews(
        images=drawn.images,
        depth=drawn.depth,
        extrinsics=drawn.extrinsics,
        intrinsics=drawn.intrinsics,
    )


def make_variants(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """Every order with every keep."""
    made = {}
    for order in arguments.orders:
        for keep in arguments.keeps:
            settings = {"keep": keep, "order": order, "block_size": (arguments.block,) * 2}
            config = BlockSparseConfig(**settings | json.loads(arguments.more))
            made[f"{order} {keep:g}"] = Recipe(method=config)
    return made


def print_rows(rows: list[ViewRow]) -> None:
    """One Markdown table; the last column is the worst of all changes against dense."""
    print(f"| variant | kept | {' | '.join(COLUMNS)} | worst change |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for row in rows:
        kept = "1" if row.keep_measured is None else f"{row.keep_measured:.3f}"
        values = " | ".join(f"{row.metrics[name]:.4g}" for name in COLUMNS)
        changes = row.change(rows[0])
        worst = max(changes, key=lambda name: changes[name])
        told = "" if row is rows[0] else f"{changes[worst]:+.1%} {worst}"
        print(f"| {row.name} | {kept} | {values} | {told} |", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure the small VGGT on unseen rooms.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--views", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--orders", nargs="*", default=["raster", "hilbert", "tiles"])
    parser.add_argument("--keeps", type=float, nargs="*", default=[0.75, 0.5, 0.35, 0.25, 0.15])
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--more", default="{}", help="further settings of the method, JSON")
    parser.add_argument("--layers", action="store_true", help="print what each site kept")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model = VGGT.from_pretrained(arguments.model).float()
    for views in arguments.views:
        truth = draw_truth(arguments.seed, arguments.scenes, views)
        between = true_rotations(truth.extrinsics).median().item()
        tokens = model.aggregator.grid(truth.images.shape).num_tokens
        print(f"\n{arguments.scenes} rooms, {views} views, {tokens} global tokens, {between:.1f}")
        print("degrees between views (median)\n")
        rows = compare_views(model, make_variants(arguments), truth)
        print_rows(rows)
        if arguments.layers:
            for row in rows[1:]:
                kept = [f"{value:.3f}" for value in row.keep_by_site.values()]
                print(f"\n{row.name} by layer: {', '.join(kept)}")


if __name__ == "__main__":
    main()
