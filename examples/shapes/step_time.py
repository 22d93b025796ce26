"""Time one call of Stable Diffusion's own UNets, on random weights, dense and under HiDiffusion.

    python examples/shapes/step_time.py sd15 --size 1024x1024 --output runs/steps.jsonl

No weights are needed: time and memory do not depend on them. Every kind of step that a schedule of
50 has is timed (the halvings act in the first ones only) and weighed by how often it comes. On a
CPU the process's own CPU time is taken, which other programs disturb least. `--count` counts the
work instead, on the meta device: in seconds, at any size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import retrofit
from retrofit.evaluate.measure import describe_machine
from retrofit.patching.recipe import Recipe, shipped_recipes
from retrofit.runtime.devices import on_accelerator, pick_device
from retrofit.runtime.machine import load_average
from retrofit.runtime.memory import peak_memory, restart_peak
from retrofit.runtime.timing import LONG, timed

STEPS = 50
SMALL, MODEL = "shapes", Path(__file__).parent / "model" / "unet"
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def make_unet(name: str, dtype: torch.dtype, device: str) -> UNet2DConditionModel:
    """A UNet of public size with random weights; or the small trained one."""
    if name == SMALL:
        unet = UNet2DConditionModel.from_pretrained(MODEL, torch_dtype=dtype)
        return unet.eval().to(device)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[name])
    unet = unet.to(dtype).to_empty(device=device).eval()
    if device == "meta":
        return unet
    with torch.no_grad():
        for index, (path, weight) in enumerate(unet.named_parameters()):
            if "norm" in path:
                weight.fill_(1.0 if path.endswith("weight") else 0.0)
            else:
                fan_in = max(1, weight[0].numel()) if weight.dim() > 1 else 1
                seed = torch.Generator(device).manual_seed(index)
                weight.normal_(std=fan_in**-0.5 if weight.dim() > 1 else 0.0, generator=seed)
    return unet


def make_inputs(
    name: str, width: int, height: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Latents, text and, for SDXL, its further inputs; batch 1."""
    config = CONFIGS.get(name, {"cross_attention_dim": 96})
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    inputs: dict[str, Any] = {
        "sample": torch.randn(1, 4, height // 8, width // 8, **options),
        "timestep": torch.tensor(501, device=device),
        "encoder_hidden_states": torch.randn(1, 77, config["cross_attention_dim"], **options),
    }
    if "addition_embed_type" in config:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, 1280, **options),
            "time_ids": torch.tensor([[height, width, 0, 0, height, width]], device=device),
        }
    return inputs


def time_call(unet: Any, inputs: dict[str, Any], device: str, rounds: int) -> dict[str, Any]:
    """Least seconds of a call, and peak memory from the weights on, in bytes."""
    restart_peak(device)
    clock = time.perf_counter if on_accelerator(device) else time.process_time
    with torch.no_grad():
        seconds = [timed(lambda: unet(**inputs), device, clock)[1] for _ in range(rounds)]
    return {"seconds": min(seconds), "peak_bytes": peak_memory(device)}


def count_work(unet: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Floating-point operations of a call, in 10^12; tensors have no values."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        unet(**inputs)
    return {"teraflops": counter.get_total_flops() / 1e12}


def kinds_of_steps(patch: Any, is_large: bool) -> list[list[int]]:
    """Steps of the schedule by which halvings act in them at this size."""
    ending = "_large" if is_large else "_small"
    kinds: dict[tuple[int, ...], list[int]] = {}
    for step in range(STEPS):
        patch.at_step(step, STEPS)
        values = patch.state.values
        acting = tuple(values[name] for name in sorted(values) if name.endswith(ending))
        kinds.setdefault(acting, []).append(step)
    return list(kinds.values())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time, or count, dense and every kind of patched step; dense once more at the end."""
    width, height = (int(side) for side in arguments.size.split("x"))
    dtype = getattr(torch, arguments.dtype)
    device = "meta" if arguments.count else arguments.device
    unet = make_unet(arguments.unet, dtype, device)
    inputs = make_inputs(arguments.unet, width, height, dtype, device)
    recipe = Recipe.read(shipped_recipes()[arguments.recipe])
    scale = min(width, height) / 8 / unet.config.sample_size

    def look(name: str) -> dict[str, Any]:
        if arguments.count:
            return count_work(unet, inputs)
        result = time_call(unet, inputs, device, arguments.rounds)
        print(f"{name}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
        return result

    key = "teraflops" if arguments.count else "seconds"
    dense, kinds = look("dense"), []
    with retrofit.patch(unet, recipe) as patch:
        for steps in kinds_of_steps(patch, scale >= recipe.method.large_scale):
            patch.at_step(steps[0], STEPS)
            found = look(f"patched, step {steps[0]} and {len(steps) - 1} like it")
            kinds.append({"first": steps[0], "steps": len(steps), **found})
    if dense.get("seconds", 0.0) < LONG:  # the first call of all also prepared the libraries
        dense = min(dense, look("dense, again"), key=lambda result: result[key])
    mean = sum(kind[key] * kind["steps"] for kind in kinds) / STEPS
    return {
        "unet": arguments.unet,
        "size": arguments.size,
        "recipe": arguments.recipe,
        "dense": dense,
        "patched": kinds,
        f"patched_mean_{key}": mean,
        "saved": 1 - mean / dense[key],
        "clock": {"cpu": "process CPU time", "meta": "none"}.get(device, "wall"),
        "rounds": arguments.rounds,
        "load": load_average(),
        "machine": describe_machine(unet),
    }


def main() -> None:
    """Time, print and append."""
    parser = argparse.ArgumentParser(description="Time one call of a UNet, dense and patched.")
    parser.add_argument("unet", choices=[*CONFIGS, SMALL])
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--recipe", default="unet2d_hidiffusion", help="a shipped recipe")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default=pick_device(None))
    parser.add_argument("--count", action="store_true", help="count the work, run nothing")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = run(arguments)
    print(json.dumps(result, indent=1))
    if arguments.output is not None:
        with arguments.output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
