"""The proof of an export: its probe, run in a process that knows nothing of retrofit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from retrofit.checkpoints import read_json
from retrofit.export.formats import FORMATS
from retrofit.runtime.errors import InputError, UnsupportedError, VerificationError

RECORD, PROBE, CARD = "export.json", "probe.safetensors", "README.md"
SCHEMA = 1
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}  # of the largest value


def verify_export(folder: Path) -> dict[str, Any]:
    """Run an export again in a fresh process and hold it against its record.

    Raises:
        InputError: If it is no export, or its runtime is missing.
        VerificationError: If it differs.
    """
    record = read_record(folder)
    need = FORMATS[record["format"]].needs
    if need is not None and importlib.util.find_spec(need) is None:
        raise UnsupportedError(
            f"{folder}: needs {need}, which is not installed: pip install {need}"
        )
    found = {**record, "verified": run_alone(folder)}
    found["seconds"] = {**record["seconds"], "exported": found["verified"]["seconds"]}
    require_same(folder, found)
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """What `export.json` says.

    Raises:
        InputError: If it is damaged, or of a newer version.
    """
    record = read_json(folder / RECORD)
    wrong = [key for key in ("format", "portable", "dtype", "recipe") if key not in record]
    if record.get("schema") != SCHEMA or wrong or record["format"] not in FORMATS:
        raise InputError(
            f"{folder / RECORD}: expected a record of schema {SCHEMA} with format, portable, dtype "
            f"and recipe, got {record.get('schema')!r}. Export anew."
        )
    return record


def run_alone(folder: Path) -> dict[str, Any]:
    """Run an export on its probe in a process of its own.

    Returns:
        `difference` from the recorded output, of its largest value, and median `seconds`.

    Raises:
        VerificationError: If it does not run.
    """
    runner = Path(__file__).with_name("runner.py")
    done = subprocess.run(  # noqa: S603 - our own file
        [sys.executable, str(runner), str(folder.resolve())],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise VerificationError(f"{folder}: does not run in a fresh process ({last}).")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def require_same(out: Path, record: dict[str, Any]) -> None:
    """Hold what a run gave against the tolerance of its dtype.

    Raises:
        VerificationError: If it is off.
    """
    difference = record["verified"]["difference"]
    tolerance = TOLERANCE.get(record["dtype"], 1e-4)
    if not difference <= tolerance:
        raise VerificationError(
            f"{out}: its output is {difference:.1e} of the largest value away from the patched "
            f"network's (tolerance {tolerance:.0e})."
        )
