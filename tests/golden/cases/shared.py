"""What several cases need: methods outside a network, and a look at calls inside one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods import Method
from retrofit.methods.run_state import RunState
from retrofit.patching.sites import AttendAtSite
from retrofit.patterns import AttentionCall, Pattern

ALONE = AttentionSite(
    path="attention", index=0, block=0, kind="self", num_heads=1, head_dim=1, layout="grid"
)


def attend_alone(
    config: Method, grid: TokenGrid, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """A method's result at a site that stands by itself."""
    call = AttentionCall(query=query, key=key, value=value)
    return config.attend(ALONE, grid, call, RunState())[0]


def pattern_alone(config: Method, grid: TokenGrid, query: Tensor, key: Tensor) -> Pattern:
    """The pattern by which it would."""
    call = AttentionCall(query=query, key=key, value=key)
    return config.pattern(ALONE, grid, call, RunState())


def weights_of(config: Method, grid: TokenGrid) -> Tensor:
    """Attention weights `[1, 1, S, S]` for queries and keys that are all alike.

    A pair that is seen has a positive weight, and all pairs of a query the same.
    """
    alike = torch.zeros(1, 1, grid.num_tokens, 1, dtype=torch.float64)
    values = torch.eye(grid.num_tokens, dtype=torch.float64)[None, None]
    return attend_alone(config, grid, alike, alike, values)


@contextmanager
def all_cores() -> Iterator[None]:
    """For minutes of work: every core, unless other test processes use them."""
    before = torch.get_num_threads()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SeenCall(NamedTuple):
    """One attention call of a patched site, tensors `[B, H, S, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@contextmanager
def watch_site(handler: AttendAtSite) -> Iterator[list[SeenCall]]:
    """Record what a patched site's attention call is given and gives."""
    calls: list[SeenCall] = []
    attend = handler.attend

    def watched(
        hidden: Any, index: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any
    ) -> Tensor:
        out = attend(hidden, index, query, key, value, *args, **more)
        calls.append(SeenCall(query, key, value, out))
        return out

    handler.attend = watched  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del handler.attend


@contextmanager
def watch_modules(model: nn.Module, *paths: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the first argument and the result of modules in their latest call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str):
        def record(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            seen[path] = (args[0] if args else kwargs["hidden_states"], out)

        return model.get_submodule(path).register_forward_hook(record, with_kwargs=True)

    hooks = [hook(path) for path in paths]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()
