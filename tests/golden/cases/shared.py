"""What several cases need: operators outside a network, and a look at calls inside one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods import Method, Operator
from retrofit.methods.run_state import RunState
from retrofit.patching.handlers import AttendAtSite


def build_operator(config: Method, grid: TokenGrid, *, index: int = 0) -> Operator:
    """A method's operator for a site that stands by itself."""
    site = AttentionSite(
        path="attention",
        index=index,
        block=index,
        kind="self",
        num_heads=1,
        head_dim=1,
        layout="grid",
    )
    return config.build(site, grid, RunState())


def weights_of(operator: Operator, grid: TokenGrid) -> Tensor:
    """Attention weights `[1, 1, S, S]` for queries and keys that are all alike.

    A pair that is seen has a positive weight, and all pairs of a query the same.
    """
    alike = torch.zeros(1, 1, grid.num_tokens, 1, dtype=torch.float64)
    values = torch.eye(grid.num_tokens, dtype=torch.float64)[None, None]
    return operator(alike, alike, values, attn_mask=None, is_causal=False, scale=None)


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

    def watched(index: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any):
        out = attend(index, query, key, value, *args, **more)
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
