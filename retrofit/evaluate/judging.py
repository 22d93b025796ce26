"""Judges of pictures: Python code that a user names, and what its numbers are worth."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.runtime.timing import Spread

TRIAL = 128  # pixels of the grey picture that a judge is tried on
Z = 1.96  # of a 95% interval

Judge = Callable[[NDArray[np.uint8], str], Mapping[str, float]]


def read_judge(file: Path, prompt: str = "") -> Judge:
    """The function `score(picture, prompt)` of a Python file that the user names.

    It is given red, green and blue as a NumPy array `[H, W, 3]`, uint8, and gives finite numbers by
    name, the same names for every picture. It is tried on a grey picture at once, so that a mistake
    in it shows before anything is drawn.

    Args:
        file: Python code, run as it is.
        prompt: To try it with.

    Raises:
        NotFoundError: If there is no such file.
        InputError: If it fails, or has no such function; later too, when the function is called.
    """
    if not file.is_file():
        raise NotFoundError(f"--judge {file}: no such file. Name a Python file.")
    spec = importlib.util.spec_from_file_location(f"judge_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--judge {file}: expected a Python file. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _importable(file.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"--judge {file}: it fails with {error!r}. Mend it.") from error
    score = getattr(module, "score", None)
    if not callable(score):
        raise InputError(
            f"--judge {file}: expected a function score(picture, prompt) that gives numbers by "
            "name. Write one."
        )
    judge = _checked(score, file)
    judge(np.full((TRIAL, TRIAL, 3), 128, np.uint8), prompt)
    return judge


def _checked(score: Callable[..., Any], file: Path) -> Judge:
    """A judge whose mistakes are told as such."""
    names: list[set[str]] = []

    def judge(picture: NDArray[np.uint8], prompt: str) -> dict[str, float]:
        where = f"--judge {file}: score(picture, {prompt!r})"
        try:
            said = score(picture, prompt)
        except Exception as error:
            raise InputError(f"{where} fails with {error!r}. Mend it.") from error
        try:
            numbers = {str(name): float(value) for name, value in said.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"{where}: expected numbers by name, as in {{'sharp': 0.9}}, got {said!r}."
            ) from error
        if not all(map(math.isfinite, numbers.values())):
            raise InputError(f"{where}: expected finite numbers, got {said!r}. Mend it.")
        names.append(set(numbers))
        if names[-1] != names[0]:
            raise InputError(
                f"{where}: expected the names {sorted(names[0])} as for the first picture, got "
                f"{sorted(numbers)}. Give the same for every picture."
            )
        return numbers

    return judge


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate of `right` in `count`."""
    middle = (right + Z * Z / 2) / (count + Z * Z)
    half = Z / (count + Z * Z) * math.sqrt(right * (count - right) / count + Z * Z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(scores: Spread) -> tuple[int, int, float, float] | None:
    """Right, count and the 95% interval, if every score is 0 or 1."""
    if not set(scores.values) <= {0.0, 1.0}:
        return None
    right, count = round(sum(scores.values)), len(scores.values)
    return right, count, *wilson_interval(right, count)
