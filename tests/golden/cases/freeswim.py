"""FreeSwim on diffusers' Wan transformer: windows, the guided steps, and those that reuse them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import retrofit
from retrofit.layout.grid import TokenGrid
from retrofit.methods.freeswim import FreeSwimConfig
from tests.golden.cases.shared import watch_modules, watch_site, weights_of
from tests.golden.harness import Meta, Tensors

NAMES = ("FreeSwim", "freeswim")
TOLERANCE = (("nocache/*", "nocache/*"), ("*", "model/*"))
INPUTS: tuple[str, ...] = ()
CHECKED: tuple[str, ...] = ()
ATTENTION = ("blocks.0.attn1", "blocks.0.attn2")
STEPS = 10


def unsupported(name: str) -> str | None:
    """All of it is supported."""
    return None


def reproduce(meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> dict[str, Tensor]:
    """Tensors of the part that `name` belongs to."""
    if name.startswith("masks/"):
        info = meta["mask_info"][name]
        return {name: _mask((info["frames"], info["h"], info["w"]), info)}
    if name == "model/mask":
        return {name: _mask(meta["patch_grid"], meta["window"])}
    network = _Network(meta, tensors, weights)
    return network.run_uncached() if name.startswith("nocache/") else network.run_cached()


def _window(half: dict[str, int]) -> tuple[int, int]:
    return 2 * half["d_h"] + 1, 2 * half["d_w"] + 1


def _mask(shape: Any, half: dict[str, int]) -> Tensor:
    frames, height, width = shape
    grid = TokenGrid(frames=frames, height=height, width=width)
    config = FreeSwimConfig(window_size=_window(half), dual_path=False)
    return weights_of(config, grid)[0, 0] > 0


class _Network:
    """The tiny network, and what goes into it."""

    def __init__(self, meta: Meta, tensors: Tensors, weights: Tensors) -> None:
        self.meta = meta
        self.inputs = {k.removeprefix("inputs/"): v for k, v in tensors.items()}
        self.model = WanTransformer3DModel(**meta["model_config"]).eval()
        self.model.load_state_dict(weights)

    def call(self, step: int, prompt: str) -> dict[str, Tensor]:
        """Both rows of the output and of the first block's attention; one row counts twice."""
        with watch_modules(self.model, *ATTENTION, "proj_out") as seen:
            self.model(
                self.inputs[f"latents_step{step}"],
                torch.tensor([self.meta["timesteps"][f"step{step}"]]),
                self.inputs[prompt],
            )
        rows = {
            path: out if len(out) == 2 else out.repeat(2, 1, 1) for path, (_, out) in seen.items()
        }
        return {
            "out": self.unpatch(rows["proj_out"]),
            "block0_attn1": rows[ATTENTION[0]],
            "block0_attn2": rows[ATTENTION[1]],
        }

    def unpatch(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, L, C]` to latents `[B, c, f, h, w]`."""
        sizes = [*self.meta["patch_grid"], *self.meta["model_config"]["patch_size"]]
        x = tokens.unflatten(2, (*sizes[3:], -1)).unflatten(1, sizes[:3])
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)

    def run_cached(self) -> dict[str, Tensor]:
        """A guided step, its unconditional call, a step that reuses, and plain full attention."""
        computed = {}
        window = _window(self.meta["window"])
        with retrofit.patch(self.model, "freeswim", window_size=window) as patch:
            patch.at_step(0, STEPS)
            with watch_site(patch.sites[ATTENTION[0]]) as calls:
                computed["cond_cache"] = self.call(0, "prompt_embeds")
            stored = [
                patch.state.store[f"/blocks.{i}.attn2"]
                for i in range(self.meta["model_config"]["num_layers"])
            ]
            patch.at_step(0, STEPS, "uncond")
            computed["uncond"] = self.call(0, "negative_prompt_embeds")
            patch.at_step(1, STEPS)
            computed["cond_reuse"] = self.call(1, "prompt_embeds")
        full = {"window_size": (10**6, 10**6), "dual_path": False}
        with retrofit.patch(self.model, "freeswim", **full):
            plain = self.call(0, "prompt_embeds")["out"][:1]
        flat = {
            f"model/{k}_{part}": v for k, parts in computed.items() for part, v in parts.items()
        }
        flat["model/plain_full_attention_out"] = plain
        for letter, tensor in zip("qkvo", calls[0], strict=True):
            flat[f"model/block0_window_{letter}"] = tensor[:1]
        # [B, H, L, D], both rows alike
        flat.update(
            (f"model/cached_cross_{i}", x[:1].transpose(1, 2)) for i, x in enumerate(stored)
        )
        return flat

    def run_uncached(self) -> dict[str, Tensor]:
        """The flavour that guides every call."""
        settings = {"window_size": _window(self.meta["window"]), "cache_steps": 0}
        with retrofit.patch(self.model, "freeswim", **settings):
            return {
                "nocache/cond_out": self.call(0, "prompt_embeds")["out"],
                "nocache/uncond_out": self.call(0, "negative_prompt_embeds")["out"],
            }
