"""Operators in PyTorch's registry, defined so that an eager call does not import its compiler.

`torch.library.custom_op` imports `torch._dynamo` with the first call of any operator, which takes
longer than to compile and load our native kernels. The registrations here do the same without.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.library import Library

from retrofit.runtime.errors import UnsupportedError

NAMESPACE = "retrofit"
# Alive as long as the process: what it registered goes away with it.
_LIBRARY = Library(NAMESPACE, "FRAGMENT")

Function = Callable[..., Any]


def define_operator(run: Function, *, fake: Function, name: str) -> Any:
    """Register an operator that changes none of its inputs.

    Args:
        run: What it does on every device; the schema is read from its annotations.
        fake: Gives results of the right shapes, dtypes and strides, not filled.
        name: Without the namespace.

    Returns:
        The operator, `torch.ops.retrofit.<name>.default`, which has no derivative yet.
    """
    _LIBRARY.define(
        name + torch.library.infer_schema(run, mutates_args=()),
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.impl(name, _hidden_from_dynamo(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_derivative(name: str, backward: Function, save: Function) -> None:
    """Register how an operator is differentiated, as `torch.library.register_autograd` does."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_LIBRARY
    )


def refuse_derivative(name: str) -> None:
    """Register that an operator, itself a derivative, can't be differentiated."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            f"{name}: expected first derivatives only, got a request for second ones. "
            "Use backend='reference' for them."
        )

    define_derivative(name, refuse, lambda ctx, inputs, output: None)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """A context in which autocast is off; where it is off already, one that costs nothing."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _hidden_from_dynamo(run: Function) -> Function:
    """Keep the compiler, where it is imported, from tracing what runs inside of an operator."""
    hidden: list[Function] = []

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return run(*args)
        if not hidden:
            hidden.append(torch.compiler.disable(run))
        return hidden[0](*args)

    return call
