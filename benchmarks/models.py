"""Whole networks of real architectures, dense against patched, with random weights.

python -m benchmarks.models --preset sd15-1024,wan-block-480p --rounds 3

Speed does not depend on what the weights are; quality does, and is not looked at here. Every
ratio is the median over rounds of dense time over patched time within the round.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.peers import Missing, import_failure
from retrofit.evaluate.metrics import output_tensor
from retrofit.methods import METHODS
from retrofit.patching.patch import patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.finite import is_finite
from retrofit.runtime.timing import Contender, Race, Spread, race

TEXT_TOKENS = {"sd15": 77, "wan": 512}
STEPS = 20
DENSE, TOMESD = "dense", "tomesd, half merged"
MERGED = 0.5  # of the tokens, by tomesd


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """A network, its input, and what is patched.

    Attributes:
        build: Gives the network, random weights.
        inputs: Keyword arguments of its forward, from the dtype.
        variants: Recipes by label.
        step: Of `STEPS`, at which it is called.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    variants: dict[str, Recipe]
    step: int = 0


def sd15_unet() -> nn.Module:
    """The UNet of Stable Diffusion 1.5: 860 million parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def wan_block(layers: int = 1) -> nn.Module:
    """Wan2.1-1.3B with one of its thirty blocks."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=128,
        ffn_dim=8960,
        num_layers=layers,
        text_dim=4096,
        freq_dim=256,
        in_channels=16,
        out_channels=16,
    )


def sd15_inputs(size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Latents of a square picture."""
    return {
        "sample": torch.randn(1, 4, size, size, dtype=dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS["sd15"], 768, dtype=dtype),
    }


def wan_inputs(frames: int, height: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Latents whose tokens are `frames x height x width`; a patch is 1 x 2 x 2 latents."""
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS["wan"], 4096, dtype=dtype),
    }


def _recipe(method: str, **settings: Any) -> Recipe:
    return Recipe.of(METHODS[method](**settings))


WINDOWS = {
    "window, half a side": _recipe("window", keep=0.25),
    "window, keep 0.5": _recipe("window", keep=0.5),
}
VIDEO = {
    "freeswim, one path": _recipe("freeswim", dual_path=False, window_size=(31, 53)),
    "t3": _recipe("t3"),
}
SMALL_VIDEO = {
    "freeswim, one path": _recipe("freeswim", dual_path=False, window_size=(15, 27)),
    "t3": _recipe("t3"),
}

PRESETS = {
    "sd15-512": ModelPreset(
        build=sd15_unet, inputs=functools.partial(sd15_inputs, 64), variants=WINDOWS
    ),
    "sd15-1024": ModelPreset(
        build=sd15_unet, inputs=functools.partial(sd15_inputs, 128), variants=WINDOWS
    ),
    "wan-block-480p": ModelPreset(
        build=wan_block, inputs=functools.partial(wan_inputs, 9, 30, 52), variants=SMALL_VIDEO
    ),
    "wan-block-1080p": ModelPreset(
        build=wan_block, inputs=functools.partial(wan_inputs, 9, 68, 120), variants=VIDEO
    ),
}


def measure(
    preset: ModelPreset, dtype: torch.dtype, options: argparse.Namespace, clock: common.Clock
) -> tuple[Race, list[Missing]]:
    """Dense, every variant and the peers, in interleaved rounds."""
    model = preset.build().eval().to(options.device, dtype)
    inputs = {
        name: value.to(options.device) if isinstance(value, torch.Tensor) else value
        for name, value in preset.inputs(dtype).items()
    }
    runs = {DENSE: lambda: model(**inputs)}
    runs |= {
        name: functools.partial(run_patched, preset, model, inputs, name)
        for name in preset.variants
    }
    peer = tomesd_run(model, inputs)
    missing = [peer] if isinstance(peer, Missing) else []
    if not isinstance(peer, Missing):
        runs[TOMESD] = peer
    contenders = [
        Contender(name=name, run=run, error=is_not_finite, tolerance=0.5)
        for name, run in runs.items()
    ]
    with torch.no_grad():
        found = race(
            contenders,
            rounds=options.rounds or 3,
            device=options.device,
            clock=clock,
        )
    return found, missing


def run_patched(preset: ModelPreset, model: nn.Module, inputs: dict[str, Any], variant: str) -> Any:
    """One call with a patch, which is put in and taken out again."""
    with patch(model, preset.variants[variant]) as handle:
        handle.at_step(preset.step, STEPS)
        return model(**inputs)


def tomesd_run(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any] | Missing:
    """Token merging at its default ratio, for the UNets that it knows."""
    if "sample" not in inputs:
        return Missing(name=TOMESD, reason="merges tokens of UNets only")
    if reason := import_failure("tomesd"):
        return Missing(name=TOMESD, reason=reason)
    tomesd = importlib.import_module("tomesd")
    rest = {name: value for name, value in inputs.items() if name != "sample"}

    def run() -> Any:
        tomesd.apply_patch(model, ratio=MERGED)
        try:
            return model(inputs["sample"], **rest)  # its hook looks for positional arguments
        finally:
            tomesd.remove_patch(model)

    return run


def is_not_finite(output: Any) -> float:
    """0 for a finite output, else 1: weights are random, so there is no truth to compare with."""
    return float(not is_finite(output_tensor(output)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser, devices=("cpu", "cuda"))
    parser.add_argument("--preset", default="sd15-512", help=", ".join(PRESETS))
    parser.add_argument("--dtype", default="float32")
    common.add_clock(parser)
    options = parser.parse_args(arguments)
    names = common.read_list("preset", options.preset, common.known(PRESETS))
    dtypes = common.read_list("dtype", options.dtype, common.read_dtype)
    machine = common.prepare(options)
    clock = common.read_clock(options.clock, machine.threads)
    for name in names:
        for dtype in dtypes:
            found, missing = measure(PRESETS[name], dtype, options, clock)
            lines = describe(name, dtype, found, missing)
            for line in ({**line, "clock": options.clock} for line in lines):
                common.emit({**line, **machine.to_dict()}) if options.json else print(
                    as_text(line), flush=True
                )
    common.print_clock(machine)
    return 0


def describe(
    preset: str, dtype: torch.dtype, found: Race, missing: Sequence[Missing]
) -> list[dict[str, Any]]:
    """A line for each route, those that did not run included."""
    head = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "load": list(found.load)}
    lines: list[dict[str, Any]] = [
        {
            **head,
            "route": name,
            "seconds": Spread(values=times).to_dict(),
            "speed": found.speed(name, DENSE).to_dict() if DENSE in found.seconds else None,
            "rounds": found.rounds,
            "noisy": DENSE in found.seconds and found.is_noisy(DENSE),
        }
        for name, times in found.seconds.items()
    ]
    lines += [{**head, "route": k, "refused": why} for k, why in found.refused.items()]
    return lines + [{**head, "route": peer.name, "missing": peer.reason} for peer in missing]


def as_text(line: dict[str, Any]) -> str:
    """The same for people."""
    head = f"{line['preset']:<16} {line['dtype']:<9} {line['route']:<24}"
    if "seconds" not in line:
        return f"{head} not timed: {line.get('refused') or line['missing']}"
    speed = line["speed"]
    shown = (
        ""
        if speed is None
        else (f"{speed['median']:5.2f}x ({speed['min']:.2f} to {speed['max']:.2f})")
    )
    noisy = ", noisy" if line["noisy"] else ""
    return f"{head} {line['seconds']['median']:8.3f} s  {shown}  load {line['load'][1]}{noisy}"


if __name__ == "__main__":
    common.run_main(main)
