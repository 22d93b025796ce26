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
from torch.nn.functional import scaled_dot_product_attention

from retrofit.kernels import neighborhood_attention
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods.base import DENSE, Method, Operator
from retrofit.methods.run_state import RunState
from retrofit.methods.window_sizes import covers
from retrofit.runtime.errors import ConfigError, UnsupportedError
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

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: With every mistake at once.
        """
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
        if problems:
            raise ConfigError(" ".join(problems))

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

    def build(self, site: AttentionSite, grid: TokenGrid, state: RunState) -> Operator:
        """Windows or guided cross-attention, for the rows of this call."""
        mode = self._present_mode(state, site.network)
        if site.kind == "cross":
            return _GuidedCross(name=f"{site.network}/{site.path}", mode=mode, state=state)
        scale = None
        if self.temperature_tokens:
            ratio = math.log(self.temperature_tokens) / math.log(self.temperature_base)
            scale = math.sqrt(ratio / site.head_dim)
        elif mode == WINDOW and covers(grid.shape, (grid.frames, *self.window_size)):
            return DENSE
        return _WindowRows(grid=grid, window_size=self.window_size, mode=mode, own_scale=scale)

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


@dataclass(frozen=True, kw_only=True)
class _WindowRows:
    """Self-attention: windows for the first half of the batch, full attention for the second."""

    grid: TokenGrid
    window_size: tuple[int, int]
    mode: int
    own_scale: float | None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UnsupportedError(
                "freeswim: expected self-attention without a mask, got one. Leave that site out."
            )
        scale = scale if self.own_scale is None else self.own_scale
        two_rows = self.mode in (DUAL, FILL)
        batch = query.shape[0] // 2 if two_rows else query.shape[0]
        windowed = neighborhood_attention(
            query[:batch],
            key[:batch],
            value[:batch],
            grid=self.grid,
            window_size=(self.grid.frames, *self.window_size),
            scale=scale,
        )
        if not two_rows:
            return windowed
        full = scaled_dot_product_attention(query[batch:], key[batch:], value[batch:], scale=scale)
        return torch.cat([windowed, full])

    def keep_fraction(self, query: Tensor, key: Tensor) -> float:
        """Windows of the first row; the guiding row is dense."""
        shape = zip((self.grid.height, self.grid.width), self.window_size, strict=True)
        kept = math.prod(min(1.0, window / length) for length, window in shape)
        return (kept + 1.0) / 2 if self.mode in (DUAL, FILL) else kept


@dataclass(frozen=True, kw_only=True)
class _GuidedCross:
    """Cross-attention: the second half's result for both, kept and taken as the mode says."""

    name: str
    mode: int
    state: RunState

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        if self.mode == REUSE:
            kept = self.state.store[self.name]
            if kept.shape != query.shape:
                raise UnsupportedError(
                    f"{self.name}: expected queries {tuple(kept.shape)} as in the guided step, got "
                    f"{tuple(query.shape)}. Size and batch must not change within a run."
                )
            return kept
        if self.mode in (DUAL, FILL):
            half = query.shape[0] // 2
            query, key, value = query[half:], key[half:], value[half:]
            attn_mask = attn_mask if attn_mask is None else _second_half(attn_mask)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale
        )
        if self.mode == FILL:
            self.state.store[self.name] = out
        return out if self.mode == WINDOW else torch.cat([out, out])

    def keep_fraction(self, query: Tensor, key: Tensor) -> float:
        """Nothing is computed where it is reused; one of two rows where it guides."""
        return {WINDOW: 1.0, REUSE: 0.0}.get(self.mode, 0.5)


def _double(value: Any, batch: int) -> Any:
    """The batch twice over; anything that is not batched as it is."""
    batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
    return torch.cat([value, value]) if batched else value


def _second_half(mask: Tensor) -> Tensor:
    return mask if mask.shape[0] == 1 else mask[mask.shape[0] // 2 :]
