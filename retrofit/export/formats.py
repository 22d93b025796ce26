"""How each format is written."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from retrofit.export.network import Subject, flatten
from retrofit.runtime.errors import UnsupportedError

TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
OPSET = 23
MOST_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of export.

    Attributes:
        file: Its main file.
        needs: Package that writes and runs it, beside PyTorch.
        portable_only: Whether it can't hold our operators.
        write: Writes the file; returns what the record says of it.
    """

    file: str
    needs: str | None
    portable_only: bool
    write: Callable[[ExportedProgram, Subject, Path], dict[str, Any]]


def trace(subject: Subject, dynamic_batch: bool) -> ExportedProgram:
    """The graph of a patched network.

    Raises:
        UnsupportedError: If it can't be traced, with PyTorch's own words.
    """
    shapes = None
    if dynamic_batch:
        rows = Dim("batch", min=1, max=MOST_ROWS)
        shapes = {name: _mark(value, rows) for name, value in subject.inputs.items()}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                subject.module, (), dict(subject.inputs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        advice = "Leave --dynamic out." if dynamic_batch else "Take another format or method."
        raise UnsupportedError(
            f"{subject.plan.recipe.methods}: its graph can't be exported ({told}). {advice}"
        ) from error


def write_pt2(program: ExportedProgram, subject: Subject, file: Path) -> dict[str, Any]:
    """`torch.export`'s format, without the paths and inputs that it would keep."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in TRACES:
                    node.meta.pop(key, None)
    program.example_inputs = None
    torch.export.save(program, file)
    return {"nodes": len(program.graph.nodes)}


def write_onnx(program: ExportedProgram, subject: Subject, file: Path) -> dict[str, Any]:
    """ONNX, opset 23, weights beside it where they are large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # their advice is not for our users
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _sort_by_top_k},
            )
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            raise UnsupportedError(
                f"{subject.plan.recipe.methods}: ONNX can't hold it ({told}). Take --format pt2."
            ) from error
    assert made is not None  # noqa: S101 - a file was not asked for
    made.save(file)
    names = [value.name for value in made.model.graph.inputs]
    return {"opset": OPSET, "names": dict(zip(names, flatten(subject.inputs), strict=True))}


def _sort_by_top_k(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort in ONNX: all of the largest, of which equal ones come by position."""
    from onnxscript import opset18

    axis = dim % len(x.shape)
    length = opset18.Shape(x, start=axis, end=axis + 1)
    return opset18.TopK(x, length, axis=axis, largest=int(descending), sorted=1)


def _mark(value: Any, rows: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mark(item, rows) for name, item in value.items()}
    return {0: rows} if value.ndim and value.shape[0] > 1 else None


FORMATS = {
    "pt2": Format(file="model.pt2", needs=None, portable_only=False, write=write_pt2),
    "onnx": Format(file="model.onnx", needs="onnxruntime", portable_only=True, write=write_onnx),
}
