"""What this machine can use: libraries, devices, room, and the backends of the operators."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from platform import machine, platform, python_version
from typing import Any

from retrofit.runtime.machine import OtherPrograms, load_average

LIBRARIES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
)
OPTIONAL = {"peft": "LoRA adapters on a patched model"}
DISTRIBUTION = "retrofit-attention"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        what: What was looked at.
        ok: Whether it can be used.
        found: What is there, or why it can't be used.
        fix: The command that mends it, empty when nothing is wrong.
    """

    what: str
    ok: bool
    found: str
    fix: str = ""


def examine() -> dict[str, list[Finding]]:
    """Look at everything; each section is a list of findings."""
    others = OtherPrograms()
    return {
        "libraries": examine_libraries(),
        "devices": examine_devices(),
        "room": [*examine_room(), examine_load(others)],
        "backends": examine_backends(),
    }


def examine_libraries() -> list[Finding]:
    """Versions, compared with what this package asks for."""
    asked = _requirements()
    found = [Finding(what="python", ok=sys.version_info >= (3, 11), found=python_version())]
    for name in LIBRARIES:
        required = asked.get(name)
        version = _version(name)
        if version is None:
            if name == "triton" and not sys.platform.startswith("linux"):
                found.append(Finding(what=name, ok=True, found="not made for this system"))
                continue
            found.append(Finding(what=name, ok=False, found="missing", fix=f"pip install {name}"))
        elif required is not None and not required.contains(version, prereleases=True):
            fix = f"pip install --upgrade '{name}{required}'"
            found.append(
                Finding(what=name, ok=False, found=f"{version}, needs {required}", fix=fix)
            )
        else:
            found.append(Finding(what=name, ok=True, found=version))
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        text = version or f"not installed; only for {purpose}: pip install {name}"
        found.append(Finding(what=name, ok=True, found=text))
    return found


def examine_devices() -> list[Finding]:
    """GPUs, and why there is none."""
    import torch

    from retrofit.runtime.devices import device_name, on_accelerator, pick_device
    from retrofit.runtime.memory import memory_info

    found = []
    kind = pick_device(None)
    for i in range(torch.accelerator.device_count() if on_accelerator(kind) else 0):
        device = f"{kind}:{i}"
        free, total = memory_info(device)
        text = f"{device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, "
        if kind == "cuda":
            text += "capability " + ".".join(map(str, torch.cuda.get_device_capability(i)))
        else:
            text += "PyTorch routes only"
        found.append(Finding(what=device, ok=True, found=text))
    if not found:
        found.append(_why_no_gpu(torch))
    threads = torch.get_num_threads()
    cores = f"{machine()}, {os.cpu_count()} cores, {threads} threads"
    return [*found, Finding(what="cpu", ok=True, found=cores)]


def examine_room() -> list[Finding]:
    """Memory and disk."""
    import psutil

    memory = psutil.virtual_memory()
    found = [
        Finding(
            what="memory",
            ok=True,
            found=f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        )
    ]
    places = {"disk here": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    for what, path in places.items():
        usage = shutil.disk_usage(path)
        text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
        fix = "" if usage.free > 1e9 else "free some space: a copy of a checkpoint needs its size"
        found.append(Finding(what=what, ok=not fix, found=text, fix=fix))
    return found


def examine_load(others: OtherPrograms) -> Finding:
    """What other programs take: times measured beside them say little."""
    cores = os.cpu_count() or 1
    held = others.cores()
    now = "" if held is None else f", other programs hold {held:.1f} of {cores} cores now"
    busy = (
        ": busy, so what is timed now takes longer; --threads 1 suffers least"
        if others.crowd("cpu")
        else ""
    )
    load = load_average()
    said = "load unknown" if load is None else f"load {load} in the last minute"
    return Finding(what="other programs", ok=True, found=f"{said}{now}{busy}")


def examine_backends() -> list[Finding]:
    """Every backend of every operator: chosen, usable, or why not and what mends it."""
    from retrofit.kernels import explain

    found = []
    for row in explain():
        text = row["reason"] or ("taken here" if row["is_chosen"] else "usable, another is taken")
        what = f"{row['operator']}: {row['backend']}"
        found.append(Finding(what=what, ok=row["is_usable"], found=text))
    return found


def system() -> str:
    """One line about the machine."""
    return platform()


def _why_no_gpu(torch: Any) -> Finding:
    if torch.version.cuda is None and torch.version.hip is None:
        if shutil.which("nvidia-smi"):
            return Finding(
                what="gpu",
                ok=False,
                found=f"there is one, but torch {torch.__version__} was built without CUDA",
                fix="pip install --force-reinstall torch "
                "--index-url https://download.pytorch.org/whl/cu128",
            )
        return Finding(
            what="gpu", ok=True, found="none: everything runs on the CPU, real models slowly"
        )
    return Finding(
        what="gpu",
        ok=False,
        found="torch was built for one, but no driver or device answers",
        fix="nvidia-smi   # shows whether the driver works; in a container add --gpus all",
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # a build that carries no record of itself, like torch's from source
        return "?" if importlib.util.find_spec(name) else None


def _requirements() -> dict[str, Any]:
    """What this package asks for, by name."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    return {r.name: r.specifier for r in map(Requirement, lines)}
