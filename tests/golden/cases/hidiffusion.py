"""HiDiffusion on diffusers' UNets and pipelines, driven by the numbers that the original drew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

import retrofit
from retrofit.methods.hidiffusion import HiDiffusionConfig
from tests.golden.cases.shared import all_cores
from tests.golden.harness import Meta, Tensors

NAMES = ("HiDiffusion", "hidiffusion")
TOLERANCE = (
    ("single/*", "single/*"),
    ("final/*", "final/*"),
    ("traj/*", "traj/*"),
    ("strided/*", "strided/*"),
)
INPUTS = ("draws/*", "shifts/*", "timesteps")
CHECKED = ("shifts/*",)  # they follow from the draws
LARGE = 128**2  # positions of a latent whose run takes more than seconds


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """All single forwards, or all that one run yields."""
    kind, run = name.split("/", 1)
    if kind == "single":
        unet = _make_unet(meta, weights)  # one for all: a patch leaves nothing behind
        return {
            f"single/{single}": _forward_once(unet, meta, tensors, info)
            for single, info in meta["single_forward"].items()
        }
    latents = _initial_latents(tensors, meta["run_info"][run].get("latents", "inputs/latents"))
    with all_cores() if latents[0, 0].numel() >= LARGE else nullcontext():
        return _run_pipeline(meta, tensors, weights, run)


def _make_unet(meta: Meta, weights: Tensors) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**meta["unet_config"]).eval()
    unet.load_state_dict(weights, assign=True)
    return unet


def _config(mode: str) -> HiDiffusionConfig:
    """The original's behaviour: at any size, with its draws, its resizing and its missing shift."""
    return HiDiffusionConfig(
        windows=mode in ("msw", "both"),
        raunet=mode in ("rau", "both"),
        min_scale=0.0,
        upstream_rng=True,
        upstream_resize=True,
        upstream_shift=True,
    )


@contextmanager
def _replay(draws: Iterator[float]) -> Iterator[None]:
    """Let `torch.rand` give recorded numbers."""

    def next_draw(size: int) -> Tensor:
        assert size == 1
        return torch.tensor([next(draws)])

    with mock.patch.object(torch, "rand", next_draw):
        yield


def _forward_once(unet: Any, meta: Meta, tensors: Tensors, info: Meta) -> Tensor:
    latents = tensors[info["input"]]
    arguments: dict[str, Any] = {"encoder_hidden_states": tensors["inputs/prompt_embeds"]}
    if meta["model_family"] == "sdxl":
        height, width = latents.shape[-2:]
        ids = torch.tensor([[8.0 * height, 8.0 * width, 0.0, 0.0, 8.0 * height, 8.0 * width]])
        pooled = tensors["inputs/pooled_prompt_embeds"]
        arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    if info["mode"] == "none":
        return unet(latents, info["timestep"], **arguments).sample
    choice = info.get("shift_choice_in_every_block") or 0
    with retrofit.patch(unet, _config(info["mode"])) as patch:
        with _replay(iter([(choice + 0.5) / 4] * len(patch.sites))):
            steps = info.get("num_inference_steps", 10)
            patch.at_step(info.get("internal_step_counter", 0), steps)
        return unet(latents, info["timestep"], **arguments).sample


def _run_pipeline(meta: Meta, tensors: Tensors, weights: Tensors, run: str) -> dict[str, Tensor]:
    info = meta["run_info"][run]
    pipeline = _make_pipeline(meta, weights)
    trajectory: list[Tensor] = []
    choices: list[list[int]] = []

    def keep_latents(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict:
        trajectory.append(values["latents"])
        return values

    arguments = _pipeline_arguments(meta, tensors, info)
    if info["mode"] == "none":
        pipeline(**arguments, callback_on_step_end=keep_latents)
    else:
        draws = tensors.get(f"draws/{run}", torch.empty(0))
        with retrofit.patch(pipeline, _config(info["mode"])) as patch:
            _note_choices(pipeline.unet, patch, choices)
            blocks = [f"unet.{block}.attn1" for block in info.get("window_block_order", ())]
            assert list(patch.report.patched) == blocks
            with _replay(iter(draws.flatten().tolist())):
                pipeline(**arguments, callback_on_step_end=keep_latents)
    stride = info.get("stride_of_saved_latents", 1)
    return {
        f"final/{run}": trajectory[-1],
        f"traj/{run}": torch.stack(trajectory),
        f"strided/{run}": torch.stack([x[..., ::stride, ::stride] for x in trajectory]),
        f"shifts/{run}": torch.tensor(choices, dtype=torch.int64),
    }


def _note_choices(unet: Any, patch: retrofit.Patch, choices: list[list[int]]) -> None:
    """Before every call of the network, note which shift each site is about to use."""

    def note(*_: Any) -> None:
        config, sites = patch.recipe.method, [handler.site for handler in patch.sites.values()]
        assert isinstance(config, HiDiffusionConfig)
        choices.append([config.shift_choice(site, patch.state) for site in sites])

    unet.register_forward_pre_hook(note)


def _make_pipeline(meta: Meta, weights: Tensors) -> Any:
    parts = {
        "unet": _make_unet(meta, weights),
        "scheduler": DDIMScheduler(**meta["scheduler"]["config"]),
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
    }
    if meta["model_family"] == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline_arguments(meta: Meta, tensors: Tensors, info: Meta) -> dict[str, Any]:
    latents = _initial_latents(tensors, info.get("latents", "inputs/latents"))
    guided = info["guidance_scale"] > 1
    names = ["prompt_embeds"] + ["negative_prompt_embeds"] * guided
    if meta["model_family"] == "sdxl":
        names += ["pooled_prompt_embeds"] + ["negative_pooled_prompt_embeds"] * guided
    return {
        "latents": latents,
        "height": 8 * latents.shape[-2],
        "width": 8 * latents.shape[-1],
        "num_inference_steps": info["num_inference_steps"],
        "guidance_scale": info["guidance_scale"],
        "eta": meta["scheduler"]["eta"],
        "output_type": "latent",
        **{name: tensors[f"inputs/{name}"] for name in names},
    }


def _initial_latents(tensors: Tensors, rule: str) -> Tensor:
    """The noise that a run starts from, as `run_info` says it in words."""
    if rule == "built from inputs/latents_quarter":
        quarter = tensors["inputs/latents_quarter"]
        above = torch.cat([quarter, quarter.flip(-1)], -1)
        return torch.cat([above, torch.cat([quarter.flip(-2), -quarter], -1)], -2)
    crop = re.fullmatch(r"top-left \((\d+), (\d+)\) crop of (\S+)", rule)
    if crop:
        return tensors[crop[3]][..., : int(crop[1]), : int(crop[2])]
    return tensors[rule.removesuffix(" itself")]
