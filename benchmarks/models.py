"""Whole networks of real architectures, dense against patched, with random weights.

python -m benchmarks.models --preset sd15-1024,wan-block-480p --rounds 3

Speed does not depend on what the weights are; quality does, and is not looked at here. Every
ratio is the median over rounds of dense time over patched time within the round.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import common
from retrofit.compare import compare_models
from retrofit.compare.measure import ModelCall, ModelInput
from retrofit.compare.report import to_dict
from retrofit.compare.result import Comparison
from retrofit.methods import METHODS
from retrofit.recipe import Recipe

TEXT_TOKENS = {"sd15": 77, "wan": 512}
STEPS = 20


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
    return Recipe(method=METHODS[method](**settings))


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
    preset: ModelPreset, name: str, dtype: torch.dtype, options: argparse.Namespace
) -> Comparison:
    """Dense and every variant in interleaved rounds."""
    model = preset.build().eval().to(options.device, dtype)
    call = ModelCall(arguments=preset.inputs(dtype), step=(preset.step, STEPS))
    item = ModelInput(name=name, calls=(call,))
    return compare_models(model, preset.variants, [item], rounds=options.rounds or 3)


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
    options = parser.parse_args(arguments)
    names = common.read_list("preset", options.preset, common.known(PRESETS))
    dtypes = common.read_list("dtype", options.dtype, common.read_dtype)
    machine = common.prepare(options)
    for name in names:
        for dtype in dtypes:
            comparison = measure(PRESETS[name], name, dtype, options)
            if options.json:
                common.emit({"preset": name, **machine.to_dict(), **to_dict(comparison)})
            else:
                _print(name, comparison)
    common.print_clock(machine)
    return 0


def _print(name: str, comparison: Comparison) -> None:
    dense = comparison.dense.seconds.median
    print(
        f"{name} {comparison.machine['dtype']}: dense {dense:.3f} s, load {comparison.load[1]}"
        f"{', noisy' if comparison.noisy else ''}"
    )
    for row in comparison.variants:
        kept = "-" if row.keep_measured is None else f"{row.keep_measured:.3f}"
        print(
            f"  {row.name:<24} {row.seconds.median:8.3f} s  {row.speed.median:5.2f}x "
            f"({min(row.speed.values):.2f} to {max(row.speed.values):.2f})  kept {kept}",
            flush=True,
        )


if __name__ == "__main__":
    common.run_main(main)
