"""HiDiffusion: large windows at the top resolution, and deep features halved in the early steps.

Paper: https://arxiv.org/abs/2311.17528 (RAU-Net, section 4.1; MSW-MSA, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.raunet import build_raunet_handlers, conv_level, is_deep_unet
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall, Pattern, Windows
from retrofit.runtime.intercept import Handler

SITES_PER_VALUE = 24  # two bits each, and a bit on top, in one 64-bit integer


@dataclass(frozen=True, kw_only=True)
class HiDiffusionConfig(Method):
    """Settings of HiDiffusion; the defaults are the paper's.

    Attributes:
        windows: Whether the top-resolution self-attention runs in 2 x 2 windows.
        raunet: Whether deep features are halved in the early steps.
        first_steps: Fraction of the steps in which the first halving acts, below and from
            `large_scale` (the paper's T1).
        second_steps: The same for the second halving (the paper's T2).
        aggressive_steps: Fraction of the steps in which, below `large_scale`, a network without
            attention at its top resolution (SDXL) starts with the coarser halving; 0 is off.
        large_scale: Both latent sides at least this multiple of the training size is "large".
        min_scale: The halving is off unless the latent exceeds this multiple of the training size
            (square root of the areas' ratio); 0 leaves it on at any size, as the original does.
        seed: Of the windows' shifts.
        upstream_rng: Draw the shifts as the original does, from PyTorch's global CPU generator.
        upstream_resize: Resample odd sizes (bicubic) around the windows, as the original does,
            instead of letting the last window be short.
        upstream_shift: Leave out a shift whose row part is 0, as the original does.
    """

    name: ClassVar[str] = "hidiffusion"
    summary: ClassVar[str] = "pictures at 2-4x the training size, without training (UNets)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.17528"
    helps: ClassVar[str] = "above the training size (512x512 for SD 1.x, 1024x1024 for SDXL)"
    idle: ClassVar[str] = "its windows are off, and no feature is halved at this size and step"
    acts_with: ClassVar[str] = "windows set to true"
    enlarges: ClassVar[bool] = True

    windows: bool = True
    raunet: bool = True
    first_steps: tuple[float, float] = (0.4, 0.7)
    second_steps: tuple[float, float] = (0.0, 0.3)
    aggressive_steps: float = 0.16
    large_scale: float = 4.0
    min_scale: float = 1.0
    seed: int = 0
    upstream_rng: bool = False
    upstream_resize: bool = False
    upstream_shift: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        fractions = {
            "first_steps": self.first_steps,
            "second_steps": self.second_steps,
            "aggressive_steps": (self.aggressive_steps,),
        }
        problems = [
            f"{name}: expected fractions of the steps in [0, 1], got {values}."
            for name, values in fractions.items()
            if not all(0 <= value <= 1 for value in values)
        ]
        if self.large_scale <= 0 or self.min_scale < 0:
            problems.append(
                "large_scale, min_scale: expected multiples of the training size, "
                f"got {self.large_scale} and {self.min_scale}."
            )
        if not (self.windows or self.raunet):
            problems.append("windows, raunet: expected at least one of them on, got neither.")
        return problems

    @property
    def needs_steps(self) -> bool:
        """The shifts and the halving depend on the step."""
        return True

    def refuses(self, network: Network) -> str | None:
        """Needs the levels of a UNet."""
        if not any(level.has_attention for level in network.levels):
            return "it needs a UNet whose levels carry attention"
        if self.raunet and not is_deep_unet(network):
            return "its halving needs a UNet with a downsampler below its attention"
        if self.raunet and network.sample_size is None:
            return "its config does not say the training size (sample_size)"
        return None

    def explain_run(self, native: str, area: float, steps: int | None) -> str | None:
        """Where nothing is halved."""
        if not self.raunet:
            return None
        if area <= 1 and self.windows:
            return f"at or below {native} {self.name} halves nothing, only windows act."
        fraction = max(*self.first_steps, *self.second_steps)
        if steps is None or int(steps * fraction) >= 1:
            return None
        return (
            f"{self.name} halves the first {fraction:.0%} of the steps, which is none of {steps}. "
            "Take more --steps, or raise first_steps with --set."
        )

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        """Windows act on the self-attention of the highest resolution that has any."""
        if site.kind != "self":
            return f"{site.kind} attention"
        if not self.windows:
            return "windows are off"
        top = next(level.index for level in network.levels if level.has_attention)
        return None if site.level == top else "below the top resolution"

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """Windows of half the height and width, under this step's shift."""
        height, width = (layout.height + 1) // 2, (layout.width + 1) // 2
        choice = self.shift_choice(site, state)
        shift = (0, height // 4 * choice, width // 4 * choice)
        if self.upstream_shift and height // 4 == 0:
            shift = (0, 0, 0)
        return Windows(layout=layout, window_size=(1, height, width), shift=shift)

    def attend(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> tuple[Tensor, Pattern]:
        """Attention in windows, of resampled tokens where the original resamples them."""
        even = TokenGrid(height=-(-layout.height // 2) * 2, width=-(-layout.width // 2) * 2)
        if not self.upstream_resize or even.shape == layout.shape:
            return super().attend(site, layout, call, state)
        query, key, value = (_resize(x, layout, even) for x in (call.query, call.key, call.value))
        resized = replace(call, query=query, key=key, value=value)
        out, pattern = super().attend(site, even, resized, state)
        return _resize(out, even, layout), pattern

    def shift_choice(self, site: AttentionSite, state: RunState) -> int:
        """Which of the four shifts a site has at this step."""
        packed = state.values[f"{site.network}/shifts{site.index // SITES_PER_VALUE}"]
        return packed // 4 ** (site.index % SITES_PER_VALUE) % 4

    def schedule(
        self, state: RunState, network: Network, sites: Sequence[AttentionSite]
    ) -> Mapping[str, int]:
        """Which halvings act at this step for either size, and every site's shift."""
        values = self._shifts(state, network, sites)
        if self.raunet and state.step is not None:
            for i, size in enumerate(("small", "large")):
                conv, block = self._halvings(state.step, state.num_steps, network, i)
                values[f"{network.name}/conv_{size}"] = int(conv)
                values[f"{network.name}/block_{size}"] = int(block)
        return values

    def handlers(self, network: Network, state: RunState) -> Sequence[tuple[str, Handler]]:
        """The resolution-aware down- and upsampling."""
        if not self.raunet:
            return ()
        return build_raunet_handlers(
            network, state, large_scale=self.large_scale, min_scale=self.min_scale
        )

    def _halvings(self, step: int, steps: int, network: Network, size: int) -> tuple[bool, bool]:
        """Whether the strided convolution and the pooled block act at a step."""
        first = step < int(steps * self.first_steps[size])
        second = step < int(steps * self.second_steps[size])
        if conv_level(network).index == 0:  # SD 1.x: the convolution is the first halving
            return first, second
        early = int(self.aggressive_steps * steps)
        if size == 0 and early > 0:
            return step < early, early <= step < int(steps * self.first_steps[0])
        return second, first

    def _shifts(
        self, state: RunState, network: Network, sites: Sequence[AttentionSite]
    ) -> dict[str, int]:
        """Two bits a site, packed so that compiled code sees one changing integer, never 0 or 1."""
        if self.upstream_rng:
            if not state.at_model_input:  # known early: the original draws only when called
                return {k: v for k, v in state.values.items() if "/shifts" in k} or _pack(
                    network, sites, [0] * len(sites)
                )
            draws = [float(torch.rand(1)) for _ in sites]
            choices = [max(0, math.ceil(draw * 4) - 1) for draw in draws]
        else:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + (state.step or 0))
            choices = torch.randint(4, (len(sites),), generator=generator).tolist()
        return _pack(network, sites, choices)


def _pack(
    network: Network, sites: Sequence[AttentionSite], choices: Sequence[int]
) -> dict[str, int]:
    values: dict[str, int] = {}
    for site, choice in zip(sites, choices, strict=True):
        name = f"{network.name}/shifts{site.index // SITES_PER_VALUE}"
        start = values.get(name, 4**SITES_PER_VALUE)
        values[name] = start + choice * 4 ** (site.index % SITES_PER_VALUE)
    return values


def _resize(x: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
    """Resample tokens `[B, H, S, D]` from one picture grid to another, bicubic."""
    batch, heads, _, dim = x.shape
    maps = x.transpose(2, 3).reshape(batch, heads * dim, old.height, old.width)
    maps = functional.interpolate(maps, size=(new.height, new.width), mode="bicubic")
    return maps.reshape(batch, heads, dim, -1).transpose(2, 3)
