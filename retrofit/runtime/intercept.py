"""One torch function inside one module: the only place where a model's computation is changed.

The innermost forward of a patched module becomes
`PatchedForward(patched_forward, module, interceptor, class_forward)`. A partial survives
`copy.deepcopy` and `pickle` with the copy's own weights, traces under
`torch.compile(fullgraph=True)` and `torch.export`, and can be put in and taken out underneath the
hooks of accelerate and diffusers and the mixed precision of accelerate, in any order.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.overrides import TorchFunctionMode

from retrofit.runtime.errors import AlreadyPatchedError, InterceptionError, UnsupportedError

Forward = Callable[..., Any]
PREPARED = "_original_forward"  # where accelerate remembers the forward that it wrapped


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


class PatchedForward(functools.partial[Any]):
    """`patched_forward` in the place of a module's bound forward."""

    @property
    def __func__(self) -> Forward:
        """The same unbound: what accelerate's mixed precision takes of a method to wrap it."""
        return functools.partial(patched_function, *self.args[1:])


def patched_function(
    interceptor: Interceptor,
    forward: Forward,
    module: torch.nn.Module,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`patched_forward`, called as a class's function is: with the module in front."""
    return patched_forward(module, interceptor, forward, *args, **kwargs)


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
    slot = _find_slot(module)
    found = _patched_part(slot.read())
    if found is None:
        return
    _, own = found
    is_free = slot.holder is module and slot.key == "forward" and slot.autocast is None
    if is_free and own is type(module).forward:
        del module.__dict__["forward"]
    else:
        slot.write(own.__get__(module))
    if _patched_part(module.__dict__.get(PREPARED)) is not None:
        setattr(module, PREPARED, own.__get__(module))


def find_interceptor(module: torch.nn.Module) -> Interceptor | None:
    """The interceptor in a module's innermost slot, if it is patched."""
    found = _patched_part(_find_slot(module).read())
    return None if found is None else found[0]


def _patched_part(forward: Any) -> tuple[Interceptor, Forward] | None:
    """Our interceptor and the class's own function in a forward, bound or not; None if not ours."""
    function = getattr(forward, "__func__", forward)
    if isinstance(function, functools.partial) and function.func is patched_function:
        return function.args[0], function.args[1]
    return None


def _place(module: torch.nn.Module, interceptor: Interceptor, where: str) -> None:
    slot = _find_slot(module)
    current = slot.read()
    own: Any = getattr(current, "__func__", None)
    if own not in _layers(type(module).forward) or current.__self__ is not module:
        raise UnsupportedError(
            f"{where}: its forward was replaced by {_describe(current)}, which can't be patched. "
            "Undo that replacement before patching."
        )
    partial = PatchedForward(patched_forward, module, interceptor, own)
    partial.__signature__ = inspect.signature(current)  # type: ignore[attr-defined]
    slot.write(partial)


def _layers(function: Any) -> Iterator[Forward]:
    """A class's function, and those that its decorators wrap: accelerate may leave one of these."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


class _Slot(NamedTuple):
    """The innermost place where the forward of a module is kept.

    Attributes:
        module: Whose forward it is.
        holder: Whose attribute it is.
        key: The attribute's name.
        autocast: What wraps it in accelerate's mixed precision, None where nothing does.
    """

    module: torch.nn.Module
    holder: Any
    key: str
    autocast: Any = None

    def read(self) -> Any:
        """The forward, as it is called: without the module."""
        if self.autocast is None:
            return getattr(self.holder, self.key)
        return types.MethodType(_cell(self.autocast).cell_contents, self.module)

    def write(self, forward: Any) -> None:
        """Put another one there."""
        if self.autocast is None:
            setattr(self.holder, self.key, forward)
            return
        function = forward.__func__
        _cell(self.autocast).cell_contents = function
        self.autocast.__wrapped__ = function  # where accelerate unwraps to


def _find_slot(module: torch.nn.Module) -> _Slot:
    """Below accelerate's hook, below diffusers', and there below accelerate's mixed precision."""
    holder, key = module, "forward"
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", None)
    if "_old_forward" in module.__dict__:
        key = "_old_forward"
    elif references:
        holder = references[0]
        key = "forward" if holder.original_forward is None else "original_forward"
    kept = getattr(holder, key)
    converter: Any = getattr(getattr(kept, "__func__", None), "__wrapped__", None)
    if type(converter).__name__ != "ConvertOutputsToFp32":
        return _Slot(module, holder, key)
    return _Slot(module, holder, key, converter.model_forward)


def _cell(wrapper: Any) -> types.CellType:
    """Where a decorated function keeps what it wraps: `torch.autocast` has it nowhere else."""
    cells: tuple[types.CellType, ...] = wrapper.__closure__
    return next(cell for cell in cells if cell.cell_contents is wrapper.__wrapped__)


def _describe(forward: Any) -> str:
    function = forward.func if isinstance(forward, functools.partial) else forward
    function = inspect.unwrap(function) if callable(function) else function
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '?')}.{name}"
