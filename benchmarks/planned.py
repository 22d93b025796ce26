"""Checkpoint folders with random weights, planned as a user would and then run.

A folder is written, `retrofit plan`'s own function predicts from its config, and the network that
`load_networks` gives is called, dense and patched. Time is the process's CPU time, which other
programs disturb least. Peak memory is the largest resident size in a call less the resident size
before it, each in a process of its own: `benchmarks.fresh_peak`.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.fresh_peak import fresh_peak, open_network, patched
from retrofit.checkpoints import find_checkpoint
from retrofit.families.examples import InputSize
from retrofit.profiling.cost.plan import Plan, Request, plan_checkpoint
from retrofit.profiling.inspection import AskedSize
from retrofit.runtime.timing import Spread, timed

DENSE = "dense"
Variant = tuple[str | None, Mapping[str, Any]]  # a method, None for none, and its settings


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A checkpoint, the size it is asked for, and what is patched.

    Attributes:
        build: Gives the network, random weights, with `save_pretrained`.
        asked: As on the command line.
        variants: By label, a method and the settings that replace its own.
    """

    build: Callable[[], Any]
    asked: AskedSize
    variants: Mapping[str, tuple[str, Mapping[str, Any]]] = field(
        default_factory=lambda: {"block-sparse": ("block-sparse", {})}
    )


def text_encoder() -> nn.Module:
    """MiniLM-L6's shape: 23 million parameters."""
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
    )


def picture_encoder() -> nn.Module:
    """ViT-B/16: 86 million parameters."""
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig())


def small_unet() -> nn.Module:
    """A UNet of 13 MB in half precision, as `examples/shapes/model` has it."""
    from diffusers import UNet2DConditionModel

    folder = Path(__file__).parent.parent / "examples" / "shapes" / "model" / "unet"
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)


def view_transformer(layers: int) -> nn.Module:
    """VGGT-1B's widths with fewer layers, camera and depth head."""
    from retrofit.architectures.vggt import VGGT

    taps = {"intermediate_layer_idx": [0, 0, layers - 1, layers - 1]}
    config: dict[str, Any] = {
        "aggregator": {"depth": layers},
        "dino": {"depth": layers},
        "camera_head": {"trunk_depth": 1},
        "depth_head": taps,
    }
    return VGGT.from_config(config)


def packed_transformer() -> nn.Module:
    """FLUX.1 dev's widths with one block of two streams and one of one: 600 million parameters."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


CIRCLES = {f"clear, radius {radius}": ("clear", {"radius": radius}) for radius in (8, 16)}
WINDOWS = {"window": ("window", {"keep": 0.25}), "block-sparse": ("block-sparse", {"keep": 0.25})}
VIDEO = {"freeswim": ("freeswim", {"dual_path": False, "window_size": (15, 27)}), "t3": ("t3", {})}

PRESETS = {
    "minilm-128": Planned(build=text_encoder, asked=AskedSize(tokens=128), variants=WINDOWS),
    "minilm-512": Planned(build=text_encoder, asked=AskedSize(tokens=512), variants=WINDOWS),
    "vit-224": Planned(
        build=picture_encoder, asked=AskedSize(width=224, height=224), variants=WINDOWS
    ),
    "vit-512": Planned(
        build=picture_encoder, asked=AskedSize(width=512, height=512), variants=WINDOWS
    ),
    "shapes-512": Planned(
        build=small_unet,
        asked=AskedSize(width=512, height=512),
        variants={**WINDOWS, "hidiffusion": ("hidiffusion", {})},
    ),
    "sd15-256": Planned(
        build=models.sd15_unet, asked=AskedSize(width=256, height=256), variants=WINDOWS
    ),
    "sd15-512": Planned(
        build=models.sd15_unet, asked=AskedSize(width=512, height=512), variants=WINDOWS
    ),
    "wan-240p": Planned(
        build=models.wan_block,
        asked=AskedSize(width=416, height=240, frames=17),
        variants={"window": ("window", {}), "t3": ("t3", {})},
    ),
    "wan-480p": Planned(
        build=models.wan_block,
        asked=AskedSize(width=832, height=480, frames=9),
        variants=VIDEO,
    ),
    "flux-512": Planned(
        build=packed_transformer, asked=AskedSize(width=512, height=512), variants=CIRCLES
    ),
    "flux-768": Planned(
        build=packed_transformer, asked=AskedSize(width=768, height=768), variants=CIRCLES
    ),
    "vggt-2": Planned(
        build=lambda: view_transformer(1), asked=AskedSize(width=518, height=392, frames=2)
    ),
    "vggt-4": Planned(
        build=lambda: view_transformer(2), asked=AskedSize(width=518, height=392, frames=4)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call took.

    Attributes:
        seconds: Of CPU time.
        peak_bytes: Above the memory resident before, of the same call in a fresh process; None
            where the system does not say.
    """

    seconds: float
    peak_bytes: int | None


def predict_and_measure(
    preset: Planned, dtype: torch.dtype, rounds: int, folder: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A line for the dense network and one for each variant, predicted and measured."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        if not (place / "config.json").exists():
            torch.manual_seed(0)
            preset.build().save_pretrained(place)
        name = str(dtype).removeprefix("torch.")
        plans = {
            label: plan_checkpoint(
                find_checkpoint(str(place), weights=False),
                Request(what=method, parameters=settings, asked=preset.asked, steps=1, dtype=name),
            )
            for label, (method, settings) in preset.variants.items()
        }
        size = next(iter(plans.values())).networks[0].size
        calls = _measure(preset, size, dtype, rounds, place)
    yield from _lines(plans, calls)


def _measure(
    preset: Planned, size: InputSize, dtype: torch.dtype, rounds: int, place: Path
) -> dict[str, list[Call]]:
    """Calls by label."""
    variants: dict[str, Variant] = {DENSE: (None, {}), **preset.variants}
    seconds = _time_rounds(variants, size, dtype, rounds, place)
    return {
        label: [
            Call(seconds=taken, peak_bytes=fresh_peak(place, dtype, size, *variants[label]))
            for taken in seconds[label]
        ]
        for label in variants
    }


def _time_rounds(
    variants: Mapping[str, Variant], size: InputSize, dtype: torch.dtype, rounds: int, place: Path
) -> dict[str, list[float]]:
    """Seconds of calls by label, interleaved."""
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    network, inputs = open_network(place, dtype, size)
    with torch.no_grad():
        for _ in range(rounds):
            for label, variant in variants.items():
                with patched(network, *variant) as module:
                    module(**inputs)  # libraries and a patch prepare themselves
                    call = functools.partial(module, **inputs)
                    seconds[label].append(timed(call, clock=time.process_time)[1])
    return seconds


def _lines(plans: Mapping[str, Plan], calls: Mapping[str, list[Call]]) -> Iterator[dict[str, Any]]:
    for label, done in calls.items():
        plan = next(iter(plans.values())) if label == DENSE else plans[label]
        network = plan.networks[0]
        cost = network.dense if label == DENSE else network.patched
        peaks = [call.peak_bytes for call in done if call.peak_bytes is not None]
        yield {
            "case": label,
            "size": str(network.size),
            "predicted_seconds": cost.total,
            "predicted_speed": 1.0 if label == DENSE else network.speed,
            "measured_seconds": Spread(values=tuple(call.seconds for call in done)).median,
            "predicted_peak_bytes": cost.call_bytes,
            "measured_peak_bytes": Spread(values=tuple(map(float, peaks))).median
            if peaks
            else None,
            "weight_bytes": cost.weight_bytes,
            "parts": dict(cost.seconds),
            "calibration_seconds": plan.rates.seconds,
        }
