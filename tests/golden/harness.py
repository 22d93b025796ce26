"""Recorded cases: where they lie, what must be reproduced, and how closely.

A case is a folder with `case.json` and `case.safetensors`. Its method (`case.json`, else the
folder's name) picks the module of `tests/golden/cases` that reproduces it, so that a case not seen
before runs without a change. `outputs.json` beside the folders lists the tensors to reproduce; for
a folder that it does not list they are all but those that the method takes as inputs.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[2]
Tensors = Mapping[str, Tensor]
Meta = dict[str, Any]
Bound = dict[str, float]


class NotReproducedError(Exception):
    """No module yields a tensor that must be reproduced."""


class Method(Protocol):
    """What a module of `tests/golden/cases` offers.

    Attributes:
        NAMES: What `case.json` may call the method, and how its folders may begin.
        TOLERANCE: For a tensor's name (a glob), a word of the key in the case's `tolerance`; the
            first that matches counts. Integers and masks need none, they are exact.
        INPUTS: Globs of tensors that are given, not reproduced.
        CHECKED: Globs of given tensors that are computed and compared all the same.
    """

    NAMES: tuple[str, ...]
    TOLERANCE: tuple[tuple[str, str], ...]
    INPUTS: tuple[str, ...]
    CHECKED: tuple[str, ...]

    def unsupported(self, name: str) -> str | None:
        """Why a tensor is not reproduced yet, None where it is."""
        ...

    def reproduce(self, meta: Meta, tensors: Tensors, weights: Tensors, name: str) -> Tensors:
        """The tensor of that name, with whatever others come on the way."""
        ...


def golden_folder() -> Path:
    """The folder of cases, which need not exist."""
    return Path(os.environ.get("RETROFIT_GOLDEN") or CHECKOUT.parent / "shared" / "golden")


def is_required() -> bool:
    """Whether a missing folder is an error."""
    return os.environ.get("RETROFIT_GOLDEN_REQUIRED") == "1"


def find_cases(root: Path) -> list[Path]:
    """The case folders."""
    return sorted(path.parent for path in root.glob("*/case.json"))


def find_method(folder: Path, methods: list[Method]) -> Method:
    """The module for a case.

    Raises:
        NotReproducedError: If there is none.
    """
    said = str(read_meta(folder).get("method", ""))
    for method in methods:
        if said.lower() in [name.lower() for name in method.NAMES]:
            return method
    for method in methods:
        if folder.name.startswith(method.NAMES):
            return method
    raise NotReproducedError(f"{folder.name}: no module reproduces the method {said!r}")


def read_meta(folder: Path) -> Meta:
    """The case's description."""
    return json.loads((folder / "case.json").read_text())


def required_names(folder: Path, method: Method) -> list[str]:
    """Tensors that must be reproduced, and those that are compared beside them."""
    listing = folder.parent / "outputs.json"
    listed = json.loads(listing.read_text()) if listing.is_file() else {}
    required = list(listed.get(folder.name) or derive_names(folder, method))
    beside = [name for name in read_meta(folder)["tensors"] if _matches(name, method.CHECKED)]
    return required + sorted(set(beside) - set(required))


def derive_names(folder: Path, method: Method) -> list[str]:
    """All tensors of a case but the inputs of its method."""
    given = ("inputs/*", "weights/*", *method.INPUTS)
    return sorted(name for name in read_meta(folder)["tensors"] if not _matches(name, given))


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


class Case:
    """One case, loaded and computed when first needed."""

    def __init__(self, folder: Path, method: Method) -> None:
        """Load nothing yet."""
        self.folder = folder
        self.method = method
        self.meta = read_meta(folder)
        self.computed: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def load(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Recorded tensors and weights, half precision raised to float32."""
        if not self._tensors:
            for name, value in load_file(self.folder / "case.safetensors").items():
                value = value.float() if value.is_floating_point() else value
                kind = self._weights if name.startswith("weights/") else self._tensors
                kind[name.removeprefix("weights/")] = value
        return self._tensors, self._weights

    def reproduce(self, name: str) -> Tensor:
        """What this project computes for a recorded tensor.

        Raises:
            NotReproducedError: If the module does not yield it.
        """
        if name not in self.computed:
            tensors, weights = self.load()
            with torch.no_grad():
                found = self.method.reproduce(self.meta, tensors, weights, name)
            self.computed.update((key, found[key]) for key in found if key in tensors)
        if name not in self.computed:
            raise NotReproducedError(f"{self.folder.name}: nothing computes {name}")
        return self.computed[name]

    def check(self, name: str) -> None:
        """Hold a computed tensor against the recorded one, and report it where asked.

        Raises:
            AssertionError: If they differ by more than the case allows.
        """
        got, expected = self.reproduce(name), self.load()[0][name]
        bound = find_bound(self.meta, self.method, name, expected)
        max_abs, ok = compare(got, expected, bound)
        report = {
            "case": self.folder.name,
            "tensor": name,
            "max_abs": max_abs,
            "tolerance": bound or "exact",
            "ok": ok,
        }
        write_report(report)
        shapes = f"{tuple(got.shape)} and {tuple(expected.shape)}"
        assert ok, f"{self.folder.name}: {name} differs by {max_abs}, allowed {bound}, {shapes}"


def find_bound(meta: Meta, method: Method, name: str, expected: Tensor) -> Bound | None:
    """The case's tolerance for a tensor, None where it must be equal.

    Raises:
        KeyError: If the case has none for it.
    """
    if not expected.is_floating_point():
        return None
    word = next(word for glob, word in method.TOLERANCE if fnmatch.fnmatchcase(name, glob))
    for key, bound in meta["tolerance"].items():
        if word in re.split(r"[\s,]+", key):
            return None if isinstance(bound, str) else bound
    raise KeyError(f"no tolerance called {word!r} for {name}")


def compare(got: Tensor, expected: Tensor, bound: Bound | None) -> tuple[float, bool]:
    """Largest absolute difference, and whether it is allowed everywhere."""
    if got.shape != expected.shape or (bound is None and got.dtype != expected.dtype):
        return float("inf"), False
    if expected.numel() == 0:
        return 0.0, True
    got, expected = got.double(), expected.double()
    difference = (got - expected).abs().nan_to_num(nan=float("inf"))
    limit = torch.zeros(())
    if bound is not None:
        relative = bound.get("rel_to_ref_max_abs", 0.0) * expected.abs().max()
        limit = bound.get("atol", 0.0) + bound.get("rtol", 0.0) * expected.abs() + relative
    return difference.max().item(), bool((difference <= limit).all())


def write_report(line: dict[str, Any]) -> None:
    """Append one comparison to the file that `RETROFIT_GOLDEN_REPORT` names."""
    path = os.environ.get("RETROFIT_GOLDEN_REPORT")
    if path:
        with Path(path).open("a") as report:
            report.write(json.dumps(line) + "\n")
