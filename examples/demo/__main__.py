"""Patch a real checkpoint, compare it, save it, verify it, undo it; then draw larger pictures.

    python -m examples.demo
    python -m examples.demo --documents 20 --output my-demo

The checkpoint is MiniLM-L6, a sentence encoder; the documents are prose that ships with Python and
the packages installed here. The pictures come from the small model in examples/shapes. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before a library looks at it

from examples.demo.long_attention import SHAPE, LongCall, time_long_call
from examples.demo.minilm import compare_minilm, find_minilm
from examples.demo.pictures import RECIPE, make_rows
from examples.demo.round_trip import PATCHED, RESTORED, run_round_trip
from retrofit.commands.console import print_table
from retrofit.evaluate.pictures import PictureRow
from retrofit.evaluate.plot import plot
from retrofit.evaluate.report import to_dict, verdict
from retrofit.evaluate.result import Comparison
from retrofit.evaluate.sheet import draw_sheet
from retrofit.evaluate.sheet import table as picture_table
from retrofit.evaluate.tables import table
from retrofit.runtime.errors import RetrofitError

EVERY = 10  # documents between two lines of progress


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=120, help="how many (default: 120)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="default: demo/")
    arguments = parser.parse_args()
    try:
        run_demo(arguments.documents, arguments.output)
    except RetrofitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run_demo(num_documents: int, folder: Path) -> None:
    """Everything, in the order in which it is printed."""
    start = time.perf_counter()
    model = find_minilm()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"1. {num_documents} documents through MiniLM-L6, dense and patched")
    show_comparison(compare_minilm(model, num_documents, print_progress()), folder)
    say(f"\n2. One attention call on {SHAPE[2]} tokens, where it is all the work, not a fifth")
    show_long_call(time_long_call())
    say("\n3. A patched checkpoint, proved in a fresh process, and back to the original's bytes")
    files = run_round_trip(model, folder)
    say(f"\nAll {len(files)} files of {RESTORED}/ have the SHA-256 of the original's.")
    say("\n4. Pictures at twice the size that a model was trained at")
    show_pictures(make_rows(progress=print_progress()), folder)
    show_what_is_where(folder)
    say(f"\nDone in {time.perf_counter() - start:.0f} s.")


def say(text: str) -> None:
    """Print at once, also into a pipe that child processes print to."""
    print(text, flush=True)


def print_progress() -> Callable[[str, int, int], None]:
    """Lines with the time left, on stderr."""
    started: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        since = started.setdefault(what, now)
        if total == 1:
            print(f"   {what} ...", file=sys.stderr, flush=True)
        elif done % EVERY == 0 and done > 1:
            left = (now - since) / (done - 1) * (total - done)
            print(f"   {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)

    return show


def show_comparison(comparison: Comparison, folder: Path) -> None:
    """Print the table and the verdict, and write the numbers and a picture to the folder."""
    lengths = [length for length in comparison.lengths if length is not None]
    say(f"   {len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens")
    print_table(*table(comparison))
    say(f"verdict: {verdict(comparison)}")
    (folder / "comparison.json").write_text(json.dumps(to_dict(comparison), indent=2) + "\n")
    plot(comparison, folder / "comparison.png", "MiniLM-L6")


def show_long_call(call: LongCall) -> None:
    """Print one row: dense against block-sparse."""
    speed = call.speed
    row = [
        f"{call.keep:.3f}",
        f"{1000 * call.dense_seconds.median:.0f}",
        f"{1000 * call.sparse_seconds.median:.0f}",
        f"{speed.median:.2f}x ({min(speed.values):.2f} to {max(speed.values):.2f})",
    ]
    print_table(["keep", "dense, ms", "block-sparse, ms", "speed, dense = 1"], [row])


def show_pictures(rows: tuple[PictureRow, ...], folder: Path) -> None:
    """Print what each row took and shows; write the pictures, with their recipes, and a sheet."""
    print_table(*picture_table(rows))
    draw_sheet(rows, folder / "pictures.png")
    for row in rows[1:]:
        for picture in row.pictures:
            name = f"{picture.prompt} {row.name}".replace(" ", "-")
            picture.save(folder / f"{name}.png")
    speed = rows[-1].speed
    if speed is not None:
        say(f"   hidiffusion with the recipe {RECIPE} took {1 / speed.median:.0%} of the time.")


def show_what_is_where(folder: Path) -> None:
    """Say what lies in the output folder."""
    say(f"\nLook at {folder}/:")
    for name, what in {
        "comparison.png": "the comparison as a picture",
        "pictures.png": "one subject or several: the training size, twice that, and hidiffusion",
        "a-purple-star-hidiffusion.png": "with its recipe inside: `retrofit generate --like` it",
        "comparison.json": "every number behind it, document by document",
        f"{PATCHED}/": "the patched checkpoint; `retrofit.json` is all that was added",
        f"{RESTORED}/": "the original again",
    }.items():
        say(f"  {name:30} {what}")


if __name__ == "__main__":
    sys.exit(main())
