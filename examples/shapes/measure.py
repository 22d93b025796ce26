"""Measure how often the small pipeline draws what was asked for, dense and under HiDiffusion.

    python examples/shapes/measure.py --size 256x256 --setup both --output runs/rates.jsonl

One JSON line per picture is appended to the output, and a picture that is there already is not made
again: a run that was stopped goes on with the same command. `--table` prints what the file holds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from check import judge
from diffusers import StableDiffusionPipeline
from evaluate import HERE, fixed_prompts
from PIL import Image, ImageDraw

import retrofit
from retrofit.evaluate.judging import wilson_interval

SETUPS: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "windows": {"raunet": False},
    "raunet": {"windows": False},
    "both": {},
}
CELL, LABEL = 92, 20  # pixels of a contact sheet


def read_size(text: str) -> tuple[int, int]:
    """`256x128` as width and height in pixels."""
    width, height = text.lower().split("x")
    return int(width), int(height)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The pictures measured so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(arguments: argparse.Namespace) -> None:
    """Make the pictures that the output lacks."""
    settings = dict(item.split("=", 1) for item in arguments.set)
    parameters = SETUPS[arguments.setup]
    if parameters is not None:
        parameters = {**parameters, **{k: yaml.safe_load(v) for k, v in settings.items()}}
    label = arguments.label or arguments.setup
    done = {(row["label"], row["size"], row["index"]) for row in read_rows(arguments.output)}
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if parameters is not None:
        retrofit.patch(pipeline, arguments.recipe, **parameters)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for index, wanted in enumerate(fixed_prompts(64)[: arguments.count]):
        for size in arguments.size:
            if (label, size, index) in done:
                continue
            row = make_one(pipeline, arguments, label, size, index)
            row |= {"parameters": parameters, "wanted": wanted}
            with arguments.output.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


def make_one(
    pipeline: Any, arguments: argparse.Namespace, label: str, size: str, index: int
) -> dict[str, Any]:
    """Make, keep and judge one picture."""
    width, height = read_size(size)
    seed = arguments.seed + index
    started, cpu_started = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.autocast):
        output = pipeline(
            fixed_prompts(64)[index]["prompt"],
            width=width,
            height=height,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            eta=arguments.eta,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    picture = (output.images[0] * 255).round().astype(np.uint8)
    folder = arguments.output.parent / f"{label}-{size}"
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"{index:02d}.png")
    return {
        "label": label,
        "size": size,
        "index": index,
        "seed": seed,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "eta": arguments.eta,
        "autocast": arguments.autocast,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "threads": arguments.threads,
        "found": judge(picture),
    }


def grade(row: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether there is one object, of the right colour too, of the right shape too."""
    found, wanted = row["found"], row["wanted"]
    one = found["objects"] == 1
    color = one and found["color"] == wanted["color"]
    return one, color, color and found["shape"] == wanted["shape"]


def group_rows(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Pictures by size and label, smallest size first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (math.prod(read_size(row["size"])), row["index"])):
        groups[row["size"], row["label"]].append(row)
    return groups


def draw_sheet(rows: list[dict[str, Any]], folder: Path, file: Path, columns: int = 10) -> None:
    """Write the first pictures of every group, with its rates above them."""
    groups = group_rows(rows)
    sheet = Image.new("RGB", (columns * CELL, len(groups) * (CELL + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((size, label), group) in enumerate(groups.items()):
        top = i * (CELL + LABEL)
        one, _, right = (sum(counts) for counts in zip(*map(grade, group), strict=True))
        text = f"{size} {label}: one object {one}/{len(group)}, right {right}/{len(group)}"
        draw.text((2, top + 4), text, fill="black", font_size=13)
        for j, row in enumerate(group[:columns]):
            with Image.open(folder / f"{label}-{size}" / f"{row['index']:02d}.png") as picture:
                picture.thumbnail((CELL - 4, CELL - 4), Image.Resampling.LANCZOS)
                sheet.paste(picture, (j * CELL + 2, top + LABEL))
    sheet.quantize(256, kmeans=3).save(file, optimize=True)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rates as lines of a Markdown table, with Wilson's 95% intervals."""
    lines = [
        "| size | model | one object | and its colour | and its shape | CPU seconds each |",
        "|---|---|---|---|---|---|",
    ]
    for (size, label), group in group_rows(rows).items():
        cells = [size, label]
        for counts in zip(*map(grade, group), strict=True):
            low, high = wilson_interval(sum(counts), len(group))
            cells.append(f"{sum(counts)}/{len(group)} ({low:.0%} to {high:.0%})")
        seconds = [row["cpu_seconds"] for row in group if "cpu_seconds" in row]
        cells.append(f"{np.median(seconds):.1f}" if seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description="Measure one-object rates.")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; pictures beside it")
    parser.add_argument("--size", action="append", default=[], help="WIDTHxHEIGHT; may be repeated")
    parser.add_argument("--setup", choices=SETUPS, default="both")
    parser.add_argument("--recipe", default="hidiffusion")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE of the method")
    parser.add_argument("--label", help="name of this row; the setup's by default")
    parser.add_argument("--count", type=int, default=64, help="prompts, from the first")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--eta", type=float, default=0.0, help="noise that DDIM adds")
    parser.add_argument("--seed", type=int, default=1000, help="of the first picture")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast, quicker")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--sheet", type=Path, help="only print it and draw the first pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not (arguments.table or arguments.sheet):
        measure(arguments)
    rows = read_rows(arguments.output)
    if arguments.label and (arguments.table or arguments.sheet):
        rows = [row for row in rows if row["label"] in arguments.label.split(",")]
    print("\n".join(table(rows)))
    if arguments.sheet:
        draw_sheet(rows, arguments.output.parent, arguments.sheet)


if __name__ == "__main__":
    main()
