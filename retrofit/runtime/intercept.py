"""One torch function inside one module: the only place where a model's computation is changed.

The innermost forward of a patched module becomes
`functools.partial(patched_forward, module, interceptor, class_forward)`. A partial survives
`copy.deepcopy` and `pickle` with the copy's own weights, traces under
`torch.compile(fullgraph=True)` and `torch.export`, and can be put in and taken out underneath the
hooks of accelerate and diffusers, in any order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from retrofit.runtime.errors import AlreadyPatchedError, InterceptionError, UnsupportedError

Forward = Callable[..., Any]


class Handler(Protocol):
    """Runs around a module's forward. It may change what goes in and what comes out.

    Called as `handler(inner, *args, **kwargs)`, where `inner(*args, **kwargs)` runs the handlers
    further in and then the module's own forward. Handlers are traced: plain Python and torch only.
    """

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run around `inner`."""
        ...


class Interceptor:
    """What sits in a patched module: whose patch it is, and its handlers, outermost first."""

    def __init__(self, owner: str) -> None:
        """Start with no handlers."""
        self.owner = owner
        self.handlers: list[Handler] = []


def patched_forward(
    module: torch.nn.Module,
    interceptor: Interceptor,
    forward: Forward,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the handlers of `interceptor` around `forward`, the class's own."""
    inner: Forward = functools.partial(forward, module)
    for handler in reversed(interceptor.handlers):
        inner = functools.partial(handler, inner)
    return inner(*args, **kwargs)


UNFLATTEN = torch.Tensor.unflatten  # its own Python body can't be traced under a mode


class FunctionMode(TorchFunctionMode):
    """Hands every call of one torch function to a replacement, and counts them."""

    def __init__(self, function: Forward, replacement: Forward) -> None:
        """Replace `function` by `replacement(call_index, *args, **kwargs)` while entered."""
        super().__init__()
        self.function = function
        self.replacement = replacement
        self.calls = 0

    def __torch_function__(
        self, func: Forward, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Dispatch one torch call; the mode is off while this runs."""
        if func is self.function:
            self.calls += 1
            return self.replacement(self.calls - 1, *args, **(kwargs or {}))
        if func is UNFLATTEN:
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


class ReplaceFunction:
    """Handler that replaces one torch function while the module runs.

    Attributes:
        function: For example `torch.nn.functional.conv2d`.
        replacement: Called as `replacement(call_index, *args, **kwargs)`.
        where: The module's path, for messages.
        why_unreached: What the user can do when the module never made the call.
    """

    def __init__(
        self, function: Forward, replacement: Forward, *, where: str, why_unreached: str
    ) -> None:
        """Store what to replace, and how to explain that it was not there."""
        self.function = function
        self.replacement = replacement
        self.where = where
        self.why_unreached = why_unreached

    def __call__(self, inner: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the function replaced.

        Raises:
            InterceptionError: If the module did not call the function.
        """
        mode = FunctionMode(self.function, self.replacement)
        with mode:
            out = inner(*args, **kwargs)
        if mode.calls == 0:
            raise InterceptionError(
                f"{self.where}: expected a call of {self.function.__name__}, got none. "
                f"{self.why_unreached}"
            )
        return out


def install(module: torch.nn.Module, handler: Handler, *, owner: str, where: str) -> None:
    """Put a handler into a module, innermost of those already there.

    Args:
        module: Any module whose forward is its class's own, possibly under foreign hooks.
        handler: What to run around its forward.
        owner: The patch this belongs to; a module belongs to one patch.
        where: The module's path, for messages.

    Raises:
        AlreadyPatchedError: If the module belongs to another patch.
        UnsupportedError: If something else has replaced the module's forward.
    """
    interceptor = find_interceptor(module)
    if interceptor is None:
        interceptor = Interceptor(owner)
        _place(module, interceptor, where)
    elif interceptor.owner != owner:
        raise AlreadyPatchedError(
            f"{where}: already patched by {interceptor.owner}. Call `remove()` on that patch first."
        )
    interceptor.handlers.append(handler)


def uninstall(module: torch.nn.Module) -> None:
    """Take our partial out again, from wherever foreign hooks have moved it."""
    holder, key = _slot(module)
    if _interceptor_of(_read(holder, key)) is None:
        return
    if holder is module and key == "forward":
        del module.__dict__["forward"]
    else:
        setattr(holder, key, type(module).forward.__get__(module))


def find_interceptor(module: torch.nn.Module) -> Interceptor | None:
    """The interceptor in a module's innermost slot, if it is patched."""
    return _interceptor_of(_read(*_slot(module)))


def _interceptor_of(forward: Any) -> Interceptor | None:
    if isinstance(forward, functools.partial) and forward.func is patched_forward:
        return forward.args[1]
    return None


def _place(module: torch.nn.Module, interceptor: Interceptor, where: str) -> None:
    holder, key = _slot(module)
    current = _read(holder, key)
    own = type(module).forward
    if current != own.__get__(module):
        raise UnsupportedError(
            f"{where}: its forward was replaced by {_describe(current)}, which can't be patched. "
            "Undo that replacement before patching."
        )
    partial = functools.partial(patched_forward, module, interceptor, own)
    partial.__signature__ = inspect.signature(current)  # type: ignore[attr-defined]
    setattr(holder, key, partial)


def _slot(module: torch.nn.Module) -> tuple[Any, str]:
    """The innermost place where a forward is kept: below accelerate's hook, below diffusers'."""
    if "_old_forward" in module.__dict__:
        return module, "_old_forward"
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", None)
    if references:
        first = references[0]
        return first, "forward" if first.original_forward is None else "original_forward"
    return module, "forward"


def _read(holder: Any, key: str) -> Any:
    return getattr(holder, key)


def _describe(forward: Any) -> str:
    function = forward.func if isinstance(forward, functools.partial) else forward
    function = inspect.unwrap(function) if callable(function) else function
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '?')}.{name}"
