"""Configs of quantised weights: which package reads them, and whether it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

from retrofit.checkpoints.layouts import Checkpoint
from retrofit.runtime.errors import UnsupportedError

# what a config calls a format, and the packages (by module) that read it
PACKAGES: Mapping[str, Mapping[str, str]] = {
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "bitsandbytes_4bit": {"bitsandbytes": "bitsandbytes"},
    "bitsandbytes_8bit": {"bitsandbytes": "bitsandbytes"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "torchao": {"torchao": "torchao"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "hqq": {"hqq": "hqq"},
    "aqlm": {"aqlm": "aqlm[gpu,cpu]"},
    "auto-round": {"auto_round": "auto-round"},
    "gguf": {"gguf": "gguf"},
}


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """What a config calls the format of its quantised weights; None where they are plain."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, Mapping):
        return None
    method = found.get("quant_method")
    if method is None:
        method = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else ""
    return str(method).lower()


def require_packages(checkpoint: Checkpoint, components: Iterable[str]) -> None:
    """Check that the packages that quantised weights need are installed.

    Raises:
        UnsupportedError: With the command that installs those that are not.
    """
    for component in components:
        method = quantization_of(checkpoint.config(component))
        packages = PACKAGES.get(method or "", {})
        absent = [package for module, package in packages.items() if not _is_there(module)]
        if absent:
            where = f"{checkpoint.name}{f'/{component}' if component else ''}"
            raise UnsupportedError(
                f"{where}: its weights are quantised ({method}), which needs {' and '.join(absent)}"
                f". Install it: pip install {' '.join(absent)}"
            )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
