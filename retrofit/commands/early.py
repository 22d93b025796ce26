"""Misspelt names, found before libraries that take seconds to import are touched.

Names and settings of methods are read from their sources, which import PyTorch when they run.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retrofit.runtime.errors import ConfigError, InputError, NotFoundError, suggest, unknown_key

METHODS = Path(__file__).resolve().parents[1] / "methods"


def checked(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that looks at its names first."""
    parameters = inspect.signature(verb).parameters

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        check_names({name: value for name, value in given.items() if name in parameters})
        verb(**given)

    return run


def check_names(given: Mapping[str, Any]) -> None:
    """Look at the model, methods and settings of a command line.

    Raises:
        InputError: If one does not exist.
    """
    method = given.get("method")
    named = [method] if isinstance(method, str) else list(method or [])
    if named:
        known = methods_and_settings()
        for name in named:
            if name not in known:
                raise NotFoundError(f"method {name!r} does not exist. {suggest(name, known)}")
        if len(named) == 1 and given.get("recipe") is None:
            _check_settings(named[0], known[named[0]], given.get("settings") or [])
    model = given.get("model")
    if model is not None:
        from retrofit.checkpoints import locate

        try:
            locate(model)
        except NotFoundError:
            if "prompt" in given and " " in model and not given["prompt"]:
                raise InputError(
                    f"MODEL: expected a checkpoint, got {model!r}. Put the prompt after -p, as in "
                    f'-p "{model}".'
                ) from None
            raise


def _check_settings(method: str, known: tuple[str, ...], settings: list[str]) -> None:
    """Leave those that are no NAME=VALUE to `read_settings`, which explains them."""
    names = [text.partition("=")[0].strip().replace("-", "_") for text in settings if "=" in text]
    for name in names:
        if name and name not in known and name != "sparsity":
            raise ConfigError(f"{method}: {unknown_key(name, known, f'parameter of {method}')}")


@functools.lru_cache
def methods_and_settings() -> dict[str, tuple[str, ...]]:
    """Every method's settings by its name."""
    found = {}
    for file in sorted(METHODS.glob("*.py")):
        for item in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(item, ast.ClassDef) and "Method" in map(ast.unparse, item.bases):
                name, settings = _read_config(item)
                if name:
                    found[name] = settings
    return found


def _read_config(item: ast.ClassDef) -> tuple[str, tuple[str, ...]]:
    """The `name` and the fields of a method's config, as its class statement says them."""
    name, settings = "", []
    for line in item.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        if "ClassVar" not in ast.unparse(line.annotation):
            settings.append(line.target.id)
        elif line.target.id == "name" and isinstance(line.value, ast.Constant):
            name = str(line.value.value)
    return name, tuple(settings)
