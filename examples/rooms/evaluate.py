r"""Measure the small VGGT on unseen rooms: dense, and with block-sparse global attention.

    python examples/rooms/evaluate.py --views 8 16 32 --rooms 128 64 32 --work runs/table
    python examples/rooms/evaluate.py --views 16 --rooms 8 --orders raster --keeps 0.5 --layers

Prints Markdown tables. Rooms are drawn from seeds that training never uses. With --work every
finished row is kept there, and the same command goes on after them. `retrofit compare` gives the
same numbers for folders of photos, with times.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from render import render_views
from train import HELD_OUT, SIZE

from retrofit.architectures.vggt import VGGT
from retrofit.evaluate.geometry import true_rotations
from retrofit.evaluate.truth import TRUTH_METRICS, SceneErrors, TrueScene
from retrofit.evaluate.views import DENSE, ViewRow, measure_variant
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.patching.recipe import Recipe, shipped_recipes

MODEL = Path(__file__).resolve().parent / "model"
COLUMNS = tuple(metric.name for metric in TRUTH_METRICS)


def draw_truth(seed: int, rooms: int, views: int) -> list[TrueScene]:
    """Unseen rooms with everything known about them."""
    drawn = render_views(HELD_OUT + seed, rooms, views, SIZE)
    return [
        TrueScene(images=images, extrinsics=extrinsics, intrinsics=intrinsics, depth=depth)
        for images, extrinsics, intrinsics, depth in zip(
            drawn.images, drawn.extrinsics, drawn.intrinsics, drawn.depth, strict=True
        )
    ]


def make_variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of the method by label: every order, and every recipe, with every keep."""
    bases = {
        order: {"order": order, "block_size": [arguments.block] * 2} for order in arguments.orders
    }
    for name in arguments.recipes:
        settings = Recipe.read(shipped_recipes()[name]).to_dict()["parameters"]
        bases[name] = settings | {"block_size": [arguments.recipe_block] * 2}
    return {
        f"{name} {keep:g}": settings | json.loads(arguments.more) | {"keep": keep}
        for name, settings in bases.items()
        for keep in arguments.keeps
    }


def measure(
    model: VGGT,
    name: str,
    settings: dict[str, Any] | None,
    scenes: list[TrueScene],
    kept: Path | None,
) -> ViewRow:
    """One row, read from where it was kept if it was measured before."""
    if kept is not None and kept.is_file():
        saved = torch.load(kept, weights_only=True)
        errors = tuple(SceneErrors(**error) for error in saved.pop("errors"))
        return ViewRow(errors=errors, **saved)
    recipe = None
    if settings is not None:
        described = {"method": BlockSparseConfig.name, "parameters": settings}
        recipe = Recipe.from_dict(described, name)
    row = measure_variant(model, name, recipe, scenes)
    if kept is not None:
        part = kept.with_suffix(".part")
        torch.save(vars(row) | {"errors": [vars(error) for error in row.errors]}, part)
        part.rename(kept)
    return row


def print_row(row: ViewRow, dense: ViewRow) -> None:
    """One line of a Markdown table; the last column is the worst change against dense."""
    kept = "1" if row.keep_measured is None else f"{row.keep_measured:.3f}"
    values = " | ".join(f"{row.metrics[name]:.4g}" for name in COLUMNS)
    told = ""
    if row is not dense:
        changes = {name: one for name, one in row.change(dense).items() if one.relative}
        worst = max(changes, key=lambda name: changes[name].value)
        change = changes[worst]
        told = f"{change.value:+.1%} {worst} ({change.low:+.1%} to {change.high:+.1%})"
    print(f"| {row.name} | {kept} | {values} | {told} |", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure the small VGGT on unseen rooms.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--views", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rooms", type=int, nargs="+", default=[16], help="for each of --views")
    parser.add_argument("--orders", nargs="*", default=["raster", "hilbert", "tiles"])
    parser.add_argument("--recipes", nargs="*", default=[], help="shipped ones, by name")
    parser.add_argument("--keeps", type=float, nargs="*", default=[0.75, 0.5, 0.35, 0.25, 0.15])
    parser.add_argument("--block", type=int, default=32, help="tokens of a block of the orders")
    parser.add_argument("--recipe-block", type=int, default=8, help="the same, of the recipes")
    parser.add_argument("--more", default="{}", help="further settings of the method, JSON")
    parser.add_argument("--layers", action="store_true", help="print what each site kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder of finished rows, to go on from")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model = VGGT.from_pretrained(arguments.model).float()
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    rooms = arguments.rooms * (1 if len(arguments.rooms) > 1 else len(arguments.views))
    for views, count in zip(arguments.views, rooms, strict=True):
        scenes = draw_truth(arguments.seed, count, views)
        between = torch.cat([true_rotations(scene.extrinsics) for scene in scenes]).median().item()
        tokens = model.aggregator.grid((1, *scenes[0].images.shape)).num_tokens
        print(f"\n{count} rooms, {views} views, {tokens} global tokens, {between:.1f} degrees")
        print("between views (median)\n")
        print(f"| variant | kept | {' | '.join(COLUMNS)} | worst change (90% of resamplings) |")
        print("|---" * (len(COLUMNS) + 3) + "|")
        rows: list[ViewRow] = []
        for name, settings in [(DENSE, None), *make_variants(arguments).items()]:
            said = json.dumps([str(arguments.model), views, count, arguments.seed, settings])
            key = f"{views}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.pt"
            file = None if arguments.work is None else arguments.work / key
            rows.append(measure(model, name, settings, scenes, file))
            print_row(rows[-1], rows[0])
        if arguments.layers:
            for row in rows[1:]:
                shown = [f"{value:.3f}" for value in row.keep_by_site.values()]
                print(f"\n{row.name} by layer: {', '.join(shown)}")


if __name__ == "__main__":
    main()
