"""The handlers that every patch installs: at its sites, where the size is seen, and at the root."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, GridReader, ValueReader
from retrofit.methods.base import DENSE, Method
from retrofit.methods.run_state import RunState
from retrofit.patching.schedulers import ScheduledState
from retrofit.runtime.errors import (
    InterceptionError,
    NonFiniteError,
    RetrofitError,
    UnsupportedError,
)
from retrofit.runtime.finite import is_finite
from retrofit.runtime.intercept import Forward, FunctionMode

UNREACHED = (
    "Attention must run through torch.nn.functional.scaled_dot_product_attention: use "
    '`attn_implementation="sdpa"` (transformers), `set_attention_backend("native")` or the default '
    "processors (diffusers), or leave the site out with `sites`."
)


class SizeScope:
    """The grid of one layout, as read in the latest forward of the module that sees the size.

    Attributes:
        where: That module, for messages.
        grid: What was read; None before the first call.
    """

    def __init__(self, where: str) -> None:
        """Start without a grid."""
        self.where = where
        self.grid: TokenGrid | None = None
        # what a `ValueReader` read, by the number of tokens without the prefix
        self.known: dict[int, TokenGrid] = {}


class ReadGrid:
    """Handler of a module that sees the size its inner sites can't see, for one layout."""

    def __init__(self, module: Any, reader: GridReader | ValueReader, scope: SizeScope) -> None:
        """Read with `reader`, write to `scope`."""
        self.module = module
        self.reader = reader
        self.scope = scope

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Note the grid, then run the module."""
        self.scope.grid = self._read(args, kwargs)
        return inner(*args, **kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenGrid:
        if not isinstance(self.reader, ValueReader):
            return self.reader(self.module, args, kwargs)
        known = self.scope.known
        if torch.compiler.is_compiling():
            return self.reader.recall(self.module, args, kwargs, known)
        grid = self.reader.read(self.module, args, kwargs)
        known[grid.num_tokens - grid.num_prefix_tokens] = grid
        return grid


class SiteCounts:
    """What a site's eager calls did; calls inside a compiled graph are not counted.

    Attributes:
        patched: Calls that the method took.
        changed: Those of them that it did not run just as the dense model does.
        dense: Calls that it left alone.
        keep: Fraction of the pairs that each measured call kept.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.patched = 0
        self.changed = 0
        self.dense = 0
        self.keep: list[float] = []


class AttendAtSite:
    """Handler of an attention module: hands its attention call to the method's operator.

    Attributes:
        site: Which call this is.
        where: The site's path with its component, for messages.
        measure: Whether to record the measured keep of each eager call (costs time).
        check_finite: Whether to look for NaN in each eager result (costs a synchronisation).
    """

    def __init__(
        self,
        site: AttentionSite,
        method: Method,
        state: RunState,
        scope: SizeScope | None,
        where: str,
    ) -> None:
        """Bind a site to a method."""
        self.site = site
        self.method = method
        self.state = state
        self.scope = scope
        self.where = where
        self.counts = SiteCounts()
        self.measure = False
        self.check_finite = False

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run the attention module with its call intercepted.

        Raises:
            InterceptionError: If the module did not make the call.
        """
        mode = FunctionMode(scaled_dot_product_attention, self.attend)
        with mode:
            out = inner(*args, **kwargs)
        if mode.calls == 0:
            raise InterceptionError(f"{self.where}: never made the attention call. {UNREACHED}")
        return out

    def attend(  # noqa: PLR0913 - the signature of the function it replaces
        self,
        call_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Take the place of `scaled_dot_product_attention`, tensors `[B, H, S, D]`."""
        decoding = self.site.kind != "cross" and query.shape[2] != key.shape[2]
        if decoding or call_index < self.site.num_calls - 1:
            if not torch.compiler.is_compiling():
                self.counts.dense += 1
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if dropout_p:
            raise UnsupportedError(
                f"{self.where}: expected no attention dropout, got {dropout_p}. Call "
                "`model.eval()`, or set the attention dropout in the model's config to 0 to train."
            )
        query, key, value = _same_dtype(query, key, value)
        operator = self.method.build(self.site, self._grid(query), self.state)
        out = operator(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
        if not torch.compiler.is_compiling():
            self.counts.patched += 1
            self.counts.changed += operator is not DENSE
            if self.measure or self.check_finite:
                self._observe(operator, query, key, out)
        return out

    def _grid(self, query: Tensor) -> TokenGrid:
        if self.scope is None or self.site.kind == "cross":
            return TokenGrid(width=query.shape[2])
        grid = self.scope.grid
        if grid is None:
            raise InterceptionError(
                f"{self.where}: ran outside {self.scope.where}, which alone sees the size. "
                "Call the whole network."
            )
        if self.site.scope == "frame":
            grid = grid.one_frame()
        grid.check(query.shape[2], self.where)
        return grid

    def _observe(self, operator: Any, query: Tensor, key: Tensor, out: Tensor) -> None:
        if self.measure:
            self.counts.keep.append(operator.keep_fraction(query, key))
        if self.check_finite and not is_finite(out):
            raise NonFiniteError(f"{self.where}: NaN or infinity{_at(self.state)}.")


class GuardRoot:
    """Outermost handler of a network: its run state, its overlap, its output.

    Attributes:
        where: Name of the network, for messages.
        installed: The recipe and the report of the patch, from which `patch_of` makes a handle.
        calls: Eager calls so far.
    """

    def __init__(
        self,
        *,
        where: str,
        state: ScheduledState,
        method: Method,
        sites: list[AttendAtSite],
    ) -> None:
        """Guard a network and the handlers of its patched sites."""
        self.installed: tuple[Any, Any] | None = None
        self.where = where
        self.state = state
        self.method = method
        self.sites = sites
        self.busy = False
        self.calls = 0

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Raises:
            NonFiniteError: If its output is not finite; the message names the first site to blame.
            RetrofitError: If it is called while it runs, or without a step where one is needed.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            self.state.keep_up(timestep)
        if self.method.needs_steps and not self.state.values["known"]:
            raise RetrofitError(
                f"{self.where}: {self.method.name} must know the denoising step. Patch the "
                "pipeline rather than the bare network (again, if it is compiled and its scheduler "
                "was replaced), or call `patch.at_step(i, n)` before each call."
            )
        if compiling:
            return inner(*args, **kwargs)
        if self.busy:
            raise RetrofitError(
                f"{self.where}: called while an earlier call is still running. A patched model "
                "serves one call at a time: give every thread its own copy."
            )
        self.busy = True
        self.calls += 1
        try:
            out = inner(*args, **kwargs)
            if not is_finite(out):
                self._blame(inner, args, kwargs)
        finally:
            self.busy = False
        return out

    def _blame(self, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run again, looking at every site, to name the first whose result is not finite."""
        if not all(is_finite(value) for value in (*args, *kwargs.values())):
            raise NonFiniteError(f"{self.where}: got NaN or infinity as input{_at(self.state)}.")
        for site in self.sites:
            site.check_finite = True
        try:
            inner(*args, **kwargs)
        finally:
            for site in self.sites:
                site.check_finite = False
        raise NonFiniteError(
            f"{self.where}: NaN or infinity{_at(self.state)}, though every patched site is "
            "finite: it arises elsewhere. Try float32 or bfloat16 instead of float16."
        )


def _same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast casts attention, which an interception comes before."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    else:
        dtype = value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _at(state: RunState) -> str:
    """Where a run stands; nothing for a network that has no steps."""
    return "" if state.step is None else f" at step {state.step} of {state.num_steps}"
