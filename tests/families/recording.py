"""What really happens in a forward: which module makes the attention call, on which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from retrofit.families import require_family
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite, Network
from retrofit.methods import Method
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall, Dense, Pattern


def row_lengths(inputs: dict[str, Any]) -> set[int]:
    """Lengths of the rows of a padded batch, each of which is attended to by itself."""
    mask = inputs.get("attention_mask")
    return set() if mask is None else set(mask.sum(1).tolist())


@dataclass(frozen=True)
class Call:
    """One attention call of an unpatched model."""

    path: str
    query: tuple[int, ...]
    key: tuple[int, ...]


class Recorder(TorchFunctionMode):
    """Notes every attention call with the innermost module that was running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.running: list[str] = []
        self.hooks = [
            hook
            for path, part in model.named_modules()
            for hook in (
                part.register_forward_pre_hook(lambda *_, path=path: self.running.append(path)),
                part.register_forward_hook(lambda *_: void(self.running.pop())),
            )
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key = named["query"], named["key"]
            self.calls.append(Call(self.running[-1], tuple(query.shape), tuple(key.shape)))
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()


def void(_: Any) -> None:
    """A forward hook that returns something would replace the output."""


def describe(model: nn.Module) -> Network:
    return require_family(model, "model").describe(model)


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Method):
    """Leaves every result as it is, and notes site, grid and shape of every call."""

    name: ClassVar[str] = "dense"
    has_causal_form: ClassVar[bool] = True
    summary: ClassVar[str] = "plain attention"
    paper: ClassVar[str] = "none"
    grids: ClassVar[list[tuple[AttentionSite, TokenGrid]]] = []
    shapes: ClassVar[list[tuple[int, ...]]] = []

    def skips(self, site: AttentionSite, network: Network) -> str | None:
        return None

    def pattern(
        self, site: AttentionSite, layout: TokenGrid, call: AttentionCall, state: RunState
    ) -> Pattern:
        if not torch.compiler.is_compiling():
            self.grids.append((site, layout))
            self.shapes.append(tuple(call.query.shape))
        return Dense(layout)


def clear_notes() -> None:
    DenseConfig.grids.clear()
    DenseConfig.shapes.clear()


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every module's own attributes; containers by content, everything else by identity."""
    return {
        path: {
            name: {key: id(item) for key, item in value.items()}
            if isinstance(value, dict)
            else id(value)
            for name, value in part.__dict__.items()
        }
        | {"__class__": type(part)}
        for path, part in model.named_modules()
    }
