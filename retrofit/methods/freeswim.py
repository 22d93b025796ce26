"""FreeSwim: inward windows for video at several times the training size, guided by full attention.

Paper: https://arxiv.org/abs/2511.14712 (inward window, dual path, cross-attention cache).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import Method
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import covers
from retrofit.patterns import AttentionCall, Dense, Halves, Neighborhood, Pattern, Reused
from retrofit.runtime.errors import UnsupportedError
from retrofit.runtime.intercept import Forward, Handler

# What the two rows of a call do, as an integer that traced code can read.
WINDOW = 0  # one row: windows, and its own cross-attention
DUAL = 1  # second row with full attention, whose cross-attention both rows take
FILL = 2  # as DUAL, and that cross-attention is kept
REUSE = 3  # one row: windows, and the kept cross-attention


@dataclass(frozen=True, kw_only=True)
class FreeSwimConfig(Method):
    """Settings of FreeSwim; the defaults are those of the 480 x 832 checkpoint.

    Attributes:
        window_size: Keys a query sees along height and width, in tokens; every frame is seen.
        dual_path: Whether a second row with full attention guides the cross-attention.
        cache_steps: Steps from one guided step to the next; 0 guides every call, the unconditional
            one included (the paper's variant without a cache, which is another algorithm).
        temperature_tokens: Tokens N of the attention scale sqrt(log_N0(N) / head_dim); 0 keeps the
            model's own scale.
        temperature_base: Tokens N0 of the training size.
    """

    name: ClassVar[str] = "freeswim"
    summary: ClassVar[str] = "video at several times the training size, without training"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.14712"
    helps: ClassVar[str] = (
        "above the training size of the checkpoint (480x832 for Wan 2.1 1.3B); never below it"
    )
    acts_with: ClassVar[str] = "a smaller window_size"
    enlarges: ClassVar[bool] = True

    window_size: tuple[int, int] = (31, 53)
    dual_path: bool = True
    cache_steps: int = 2
    temperature_tokens: int = 3120
    temperature_base: int = 1560

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        problems = []
        if min(self.window_size) < 1:
            problems.append(f"window_size: expected at least 1 a side, got {self.window_size}.")
        if self.cache_steps < 0:
            problems.append(f"cache_steps: expected 0 or more, got {self.cache_steps}.")
        if self.temperature_tokens < 0 or self.temperature_base < 2:
            problems.append(
                "temperature_tokens, temperature_base: expected token counts, got "
                f"{self.temperature_tokens} and {self.temperature_base}."
            )
        return problems

    @property
    def needs_steps(self) -> bool:
        """The cache is refreshed by the step."""
        return self.dual_path and self.cache_steps > 0

    def refuses(self, network: Network) -> str | None:
        """Needs self-attention over the frames of a video, and cross-attention to guide it."""
        if not network.has_frames:
            return "it is for videos: it needs frames that follow one another in time"
        kinds = {site.kind for site in network.sites if site.layout is not None}
        if "self" not in kinds:
            return "it needs self-attention over a grid of known height and width"
        if self.dual_path and "cross" not in kinds:
            return "its dual path needs cross-attention (set dual_path to false)"
        return None

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        """Takes self-attention, and cross-attention when there are two paths."""
        if site.kind == "self" or (site.kind == "cross" and self.dual_path):
            return None
        return f"{site.kind} attention"

    def schedule(
        self, state: RunState, network: Network, sites: Sequence[AttentionSite]
    ) -> Mapping[str, int]:
        """Which rows this call runs, and whether it keeps or takes a cross-attention."""
        return {f"{network.name}/mode": self._mode(state, network)}

    def _mode(self, state: RunState, network: Network) -> int:
        if not self.dual_path:
            return WINDOW
        if self.cache_steps == 0:
            return DUAL
        if state.branch != "cond":
            return WINDOW
        executed = (state.step or 0) - state.first_step
        filled = any(name.startswith(f"{network.name}/") for name in state.store)
        return REUSE if filled and executed % self.cache_steps else FILL

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        """Windows for self-attention; full attention in the second row of a guided call."""
        mode, dense = self._present_mode(state, site.network), Dense(layout)
        if site.kind == "cross":
            parts = {WINDOW: dense, REUSE: Reused(layout=layout)}
            return parts.get(mode, Halves(first=Reused(layout=layout), second=dense))
        size = (layout.frames, *self.window_size)
        if mode == WINDOW and not self.temperature_tokens and covers(layout.shape, size):
            return dense
        call.refuse_mask(self.name, "or `is_causal`")
        call.refuse_causal(self.name)
        windows = Neighborhood(layout=layout, window_size=size)
        return Halves(first=windows, second=dense) if mode in (DUAL, FILL) else windows

    def attend(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> tuple[Tensor, Pattern]:
        """Guided cross-attention, or windows at the temperature of the size."""
        if site.kind == "cross":
            mode = self._present_mode(state, site.network)
            out = _guide(call, mode, state, f"{site.network}/{site.path}")
            return out, self.pattern(site, layout, call, state)
        if self.temperature_tokens:
            ratio = math.log(self.temperature_tokens) / math.log(self.temperature_base)
            call = call.with_scale(math.sqrt(ratio / site.head_dim))
        return super().attend(site, layout, call, state)

    def _present_mode(self, state: RunState, network: str) -> int:
        if not self.dual_path:
            return WINDOW
        return DUAL if self.cache_steps == 0 else state.values[f"{network}/mode"]

    def handlers(self, network: Network, state: RunState) -> Sequence[tuple[str, Handler]]:
        """The second row, added and dropped around the whole network."""
        return [("", _AddGuideRow(self, network.name, state))] if self.dual_path else ()


class _AddGuideRow:
    """Runs the network on its batch twice over, and returns the first half."""

    def __init__(self, config: FreeSwimConfig, network: str, state: RunState) -> None:
        self.config = config
        self.network = network
        self.state = state

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        if self.config._present_mode(self.state, self.network) not in (DUAL, FILL):
            return inner(*args, **kwargs)
        self.state.note_acted()
        batch = (args[0] if args else kwargs["hidden_states"]).shape[0]
        doubled = [_double(value, batch) for value in args]
        out = inner(*doubled, **{name: _double(value, batch) for name, value in kwargs.items()})
        if isinstance(out, tuple):
            return (out[0][:batch], *out[1:])
        return type(out)(sample=out.sample[:batch])


def _guide(call: AttentionCall, mode: int, state: RunState, name: str) -> Tensor:
    """Cross-attention: the second half's result for both, kept and taken as the mode says."""
    if mode == REUSE:
        kept = state.store[name]
        if kept.shape != call.query.shape:
            raise UnsupportedError(
                f"{name}: expected queries {tuple(kept.shape)} as in the guided step, got "
                f"{tuple(call.query.shape)}. Size and batch must not change within a run."
            )
        return kept
    if mode in (DUAL, FILL):
        call = call.rows(slice(call.query.shape[0] // 2, None))
    out = call.attend_densely()
    if mode == FILL:
        state.store[name] = out
    return out if mode == WINDOW else torch.cat([out, out])


def _double(value: Any, batch: int) -> Any:
    """The batch twice over; anything that is not batched as it is."""
    batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
    return torch.cat([value, value]) if batched else value
