"""Load recorded cases, and hold computed tensors against them at each case's own tolerance."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("RETROFIT_GOLDEN", REPOSITORY.parent / "shared" / "golden"))


def find_cases(*prefixes: str) -> list[Path]:
    """Case folders whose names start with one of the prefixes."""
    if not GOLDEN.is_dir():
        return []
    folders = sorted(path.parent for path in GOLDEN.glob("*/case.json"))
    return [folder for folder in folders if folder.name.startswith(prefixes)]


def load_case(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The case's description, its tensors and its weights, half precision raised to float32."""
    meta = json.loads((folder / "case.json").read_text())
    raw = load_file(folder / "case.safetensors")
    raw = {
        name: value.float() if value.is_floating_point() else value for name, value in raw.items()
    }
    weights = {k.removeprefix("weights/"): v for k, v in raw.items() if k.startswith("weights/")}
    return meta, {k: v for k, v in raw.items() if not k.startswith("weights/")}, weights


def bound_of(meta: dict[str, Any], name: str) -> dict[str, float]:
    """The tolerance that names this tensor; what none names has that of `patch_out`."""
    for key, bound in meta["tolerance"].items():
        if any(fnmatchcase(name, pattern) for pattern in key.split()):
            return bound
    return meta["tolerance"]["patch_out/special_out"]


def used_bound(meta: dict[str, Any], name: str, got: Tensor, expected: Tensor) -> float:
    """Largest error, as a fraction of what the case allows; integers and masks must be equal."""
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    if not expected.is_floating_point():
        assert got.dtype == expected.dtype
        return 0.0 if torch.equal(got, expected) else float("inf")
    bound = bound_of(meta, name)
    error = (got.double() - expected.double()).abs()
    return (error / (bound["atol"] + bound["rtol"] * expected.double().abs())).max().item()


def required(folder: Path) -> Iterator[str]:
    """Names of the tensors of a case that have to be reproduced."""
    listed = json.loads((folder.parent / "outputs.json").read_text())
    yield from listed[folder.name]
