"""What a short fine-tune wins back on `shapes`: losses on held-out pictures, and pictures judged.

    python -m benchmarks.finetune --work runs/finetune --steps 500 --seeds 0,1,2
    python -m benchmarks.finetune --work runs/finetune --case clear --train lora --lr 3e-3
    python -m benchmarks.finetune --table benchmarks/results/2026-12-01/finetune.jsonl

Every case is a method that makes noise of `shapes` until its weights know it. Pictures to learn
from are drawn; other ones are held out; 32 fixed prompts are drawn before and after, and `check.py`
counts those that show one object of the right colour and shape. One line of JSON a run, in
`--output`; runs that are in it already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import retrofit
from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import load_whole
from retrofit.runtime.machine import processor_name
from retrofit.training import Running, finetune, work_folder
from retrofit.training.request import read_request
from retrofit.training.sources import plan_finetune

SHAPES = Path(__file__).resolve().parents[1] / "examples" / "shapes"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "clear": ("clear", {"radius": 3}),
    "neighborhood": ("neighborhood", {"keep": 0.1}),
    "t3": ("t3", {"cycle": [[1, 8, 4], [1, 4, 8]]}),
}
PICTURES, HELD_OUT, PROMPTS, SAMPLE_STEPS, GUIDANCE = 4000, 128, 32, 25, 3.0


def draw_pictures(folder: Path, count: int, seed: int) -> None:
    """Captioned pictures of `shapes`, where they are not there yet."""
    from draw import caption, paint, random_scene  # beside `shapes`

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"{count - 1:05d}.txt").is_file():
        return
    rng = np.random.default_rng(seed)
    for i in range(count):
        scene = random_scene(rng)
        Image.fromarray(paint(scene, 128, 128)).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")


def judge_pictures(pipeline: Any, sheet: Path, size: int = 128) -> dict[str, int]:
    """How many of 32 fixed prompts show one object, of the right colour, of the right shape."""
    from check import judge
    from draw import contact_sheet
    from evaluate import fixed_prompts, generate

    pipeline.set_progress_bar_config(disable=True)
    wanted = fixed_prompts()[:PROMPTS]
    options = argparse.Namespace(steps=SAMPLE_STEPS, guidance=GUIDANCE, seed=1000)
    pictures = generate(pipeline, [item["prompt"] for item in wanted], options, size)
    contact_sheet(pictures, columns=8).save(sheet)
    found = [(item, judge(picture)) for item, picture in zip(wanted, pictures, strict=True)]
    one = [(item, seen) for item, seen in found if seen["objects"] == 1]
    color = [(item, seen) for item, seen in one if seen["color"] == item["color"]]
    right = [1 for item, seen in color if seen["shape"] == item["shape"]]
    return {"one": len(one), "color": len(color), "right": len(right)}


def run_case(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Fine-tune once, and measure what came out."""
    method, settings = CASES[name]
    label = f"{name}-{arguments.train}-{arguments.steps}-{seed}"
    given = {
        "data": str(arguments.work / "pictures"),
        "held_out": HELD_OUT,
        "seed": seed,
        **{key: getattr(arguments, key) for key in ("steps", "train", "objective", "lr")},
    }
    request = read_request(given, where="benchmark")
    plan = plan_finetune(find_checkpoint("shapes"), method, request, **settings)
    out = arguments.work / label
    done = finetune(plan, request, out, Running(resume=work_folder(out).is_dir()))
    outcome = done.outcome
    tuned = retrofit.load(out, dtype="float32")
    return {
        "case": name,
        "settings": settings,
        "train": arguments.train,
        "objective": arguments.objective,
        "lr": arguments.lr,
        "steps": arguments.steps,
        "seed": seed,
        "parameters": done.num_parameters,
        "dense": vars(outcome.dense),
        "before": vars(outcome.looks[0]),
        "after": vars(outcome.last),
        "recovered": outcome.recovered,
        "pictures": judge_pictures(tuned, arguments.work / f"{label}.png"),
        "seconds_a_step": outcome.seconds / max(1, outcome.steps_run),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "processor": processor_name(),
    }


def run_before(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Pictures of a case without a fine-tune, and of the dense model."""
    pipeline = load_whole(find_checkpoint("shapes"), dtype="float32")
    if name != "dense":
        retrofit.patch(pipeline, CASES[name][0], **CASES[name][1])
    sheet = arguments.work / f"{name}-before.png"
    return {
        "case": name,
        "steps": 0,
        "seed": 0,
        "train": "",
        "pictures": judge_pictures(pipeline, sheet),
    }


def print_table(file: Path) -> None:
    """Means over seeds, as Markdown, with the least and the most."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    before = {line["case"]: line["pictures"] for line in lines if not line["steps"]}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["steps"]:
            groups.setdefault((line["case"], line["train"], line["steps"]), []).append(line)
    print("| | trained, steps, seeds | loss | weighted | distance | before: one/colour/right "
          "of 32 | after | s a step |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for (case, train, steps), runs in groups.items():
        shares = [
            _spread([100 * run["recovered"][name] for run in runs], "%")
            for name in ("loss", "weighted", "error")
        ]
        old = before.get(case)
        cells = [
            f"{case} {runs[0]['settings']}",
            f"{train}, {steps}, {len(runs)}",
            *shares,
            "" if old is None else "/".join(map(str, old.values())),
            "; ".join("/".join(map(str, run["pictures"].values())) for run in runs),
            _spread([run["seconds_a_step"] for run in runs], "", digits=2),
        ]
        print(f"| {' | '.join(cells)} |")


def _spread(values: list[float], unit: str, digits: int = 0) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Run what is asked for and is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs"), help="of pictures and runs")
    parser.add_argument("--output", type=Path, help="file of results; WORK/results.jsonl")
    parser.add_argument("--case", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--train", default="all")
    parser.add_argument("--objective", default="both")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--before", action="store_true", help="also without a fine-tune")
    parser.add_argument("--table", type=Path, help="only print what a file of results holds")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print_table(arguments.table)
        return
    sys.path.insert(0, str(SHAPES))
    output = arguments.output or arguments.work / "results.jsonl"
    draw_pictures(arguments.work / "pictures", PICTURES, seed=77)
    keys = ("case", "steps", "seed", "train")
    lines = output.read_text().splitlines() if output.is_file() else []
    there = {tuple(json.loads(line)[key] for key in keys) for line in lines}

    def note(line: dict[str, Any]) -> None:
        with output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(
            json.dumps({key: line.get(key) for key in (*keys, "recovered", "pictures")}), flush=True
        )

    names = arguments.case.split(",")
    for seed in map(int, arguments.seeds.split(",")):
        for name in names:
            if (name, arguments.steps, seed, arguments.train) not in there:
                note(run_case(arguments, name, seed))
    for name in ("dense", *names) if arguments.before else ():
        if (name, 0, 0, "") not in there:
            note(run_before(arguments, name))


if __name__ == "__main__":
    main()
