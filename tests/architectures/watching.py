"""Look at the attention call of one module while a network runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """Records every call of scaled_dot_product_attention and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention:
            assert not kwargs, "a call with a mask or a scale"
            self.calls.append(dict(zip(("q", "k", "v"), args, strict=True)) | {"heads_out": out})
        return out


def watch_attention(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """Run something, and record the one attention call inside a module on the way.

    Returns:
        What `run` returned, and `q`, `k`, `v`, `heads_out` [B, H, S, D], `attn_in`, `attn_out`.
    """
    watch = Watch()
    seen: dict[str, Tensor] = {}

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["attn_in"] = args[0]
        watch.__enter__()

    def after(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        watch.__exit__(None, None, None)
        seen["attn_out"] = out

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    (call,) = watch.calls
    return result, seen | call
