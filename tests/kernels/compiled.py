"""Compile Triton kernels for GPUs that are not there, and look at what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block
# what the matrix units of an architecture are called
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
COUNTED = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "STL", "LDL")


@dataclass(frozen=True, kw_only=True)
class Binary:
    """Resources and instructions of a compiled kernel."""

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


def compile_kernel(
    kernel: Any,
    arch: int,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
) -> Binary:
    """Compile a kernel ahead of time.

    Args:
        kernel: What `triton.jit` made.
        arch: Compute capability times ten.
        types: Of arguments, `*bf16` for example; a name ending in `*` stands for all that begin so.
            Arguments that are neither here nor in `constants` are `i32`.
        constants: Values of compile-time arguments; None for a pointer that is not given.
        options: `num_warps` and the like.
    """
    signature: dict[str, str] = {}
    attributes: dict[Any, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        prefixes = [key for key in types if key.endswith("*") and name.startswith(key[:-1])]
        kind = types.get(name) or (types[max(prefixes, key=len)] if prefixes else "i32")
        signature[name] = "constexpr" if name in constants else kind
        is_stride = re.fullmatch(r"(q|k|v|out|dout)_(split|batch|head|token)", name)
        if signature[name].startswith("*") or is_stride:
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", path)
        code = _run("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Binary(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=made.metadata.shared,
        instructions={name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED},
    )


def _run(tool: str, *arguments: Any) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
