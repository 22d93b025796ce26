"""Generate fixed test prompts with the small pipeline and count what `check.py` finds right.

    python examples/shapes/evaluate.py --output runs/evaluation --scale 1 --scale 2

Prints one row per picture size with 95% intervals (Wilson); writes contact sheets and verdicts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check import judge
from diffusers import StableDiffusionPipeline
from draw import COLORS, SHAPES, TEXTURES, TONES, contact_sheet
from networks import SIZE

from retrofit.evaluate.judging import wilson_interval

HERE = Path(__file__).parent


def fixed_prompts(count: int = 64) -> list[dict[str, str]]:
    """Return the fixed prompts: every shape and colour once, then again with a background.

    Each has `prompt`, `shape` and `color`. The order mixes shapes and colours, so that the first
    few are a fair sample.
    """
    tones, textures, colors = list(TONES), list(TEXTURES), list(COLORS)
    found = []
    for index in range(count):
        shape = SHAPES[index % len(SHAPES)]
        color = colors[(index // len(SHAPES) + 3 * index) % len(colors)]
        prompt = f"{'an' if color == 'orange' else 'a'} {color} {shape}"
        if index % 4 == 3 or index >= len(SHAPES) * len(COLORS):
            look = f"{tones[index % 3]} {textures[(index // 3) % 4]}"
            prompt += f" on a {look} background"
        found.append({"prompt": prompt, "shape": shape, "color": color})
    return found


def generate(
    pipeline: StableDiffusionPipeline, prompts: list[str], arguments: argparse.Namespace, size: int
) -> list[np.ndarray]:
    """Generate one picture per prompt; picture `i` starts from the noise of seed `seed + i`."""
    pictures: list[np.ndarray] = []
    batch = max(1, 16 * SIZE * SIZE // (size * size))
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        seeds = [arguments.seed + first + index for index in range(len(part))]
        output = pipeline(
            part,
            height=size,
            width=size,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        )
        pictures += list((output.images * 255).round().astype(np.uint8))
    return pictures


def evaluate_size(
    pipeline: StableDiffusionPipeline, arguments: argparse.Namespace, scale: int
) -> dict[str, Any]:
    """Generate at a multiple of the training size; return the counts and the verdicts."""
    size = scale * SIZE
    wanted = fixed_prompts()[: arguments.count]
    started = time.monotonic()
    pictures = generate(pipeline, [item["prompt"] for item in wanted], arguments, size)
    seconds = (time.monotonic() - started) / len(pictures)
    contact_sheet(pictures, columns=8).save(arguments.output / f"{size}x{size}.png")
    verdicts: list[dict[str, Any]] = [
        {**item, "found": judge(picture)} for item, picture in zip(wanted, pictures, strict=True)
    ]
    single = [item for item in verdicts if item["found"]["objects"] == 1]
    color = [item for item in single if item["found"]["color"] == item["color"]]
    right = [item for item in color if item["found"]["shape"] == item["shape"]]
    return {
        "size": size,
        "count": len(verdicts),
        "one": len(single),
        "color": len(color),
        "right": len(right),
        "seconds": seconds,
        "verdicts": verdicts,
    }


def row(result: dict[str, Any]) -> str:
    """Return one line of the table."""
    cells = [f"{result['size']}x{result['size']}"]
    for key in ("one", "color", "right"):
        low, high = wilson_interval(result[key], result["count"])
        rate = f"{result[key]}/{result['count']} ({low:.0%} to {high:.0%})"
        cells.append(rate)
    return f"| {' | '.join(cells)} | {result['seconds']:.1f} |"


def main() -> None:
    """Evaluate at the sizes asked for."""
    parser = argparse.ArgumentParser(description="Evaluate the small text-to-image pipeline.")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--output", type=Path, required=True, help="folder of sheets and verdicts")
    parser.add_argument("--scale", type=int, action="append", help="multiple of the training size")
    parser.add_argument("--count", type=int, default=64, help="prompts, from the first")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1000, help="of the first picture")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    print("| size | one object | and its colour | and its shape | seconds each |")
    print("|---|---|---|---|---|")
    results = []
    for scale in arguments.scale or [1]:
        results.append(evaluate_size(pipeline, arguments, scale))
        print(row(results[-1]), flush=True)
    text = json.dumps(results, indent=1)
    (arguments.output / "verdicts.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
