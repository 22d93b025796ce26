"""Exports: a patched network as a graph that runs where retrofit is not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from retrofit.artifact.planning import Plan, plan_patch
from retrofit.artifact.saving import public_name
from retrofit.artifact.writing import new_folder, refuse_output
from retrofit.checkpoints import Checkpoint
from retrofit.export.card import make_card
from retrofit.export.formats import FORMATS, trace
from retrofit.export.measure import (
    count_graph,
    count_work,
    distance,
    is_mask_honoured,
    run_dense,
    time_eager,
)
from retrofit.export.network import Subject, flatten, open_subject, plain_operators
from retrofit.export.proof import (
    CARD,
    PROBE,
    RECORD,
    SCHEMA,
    read_record,
    require_same,
    run_alone,
    verify_export,
)
from retrofit.methods import Method
from retrofit.patching.recipe import Recipe
from retrofit.profiling.inspection import AskedSize
from retrofit.runtime.errors import InputError, NotFoundError, UnsupportedError, suggest
from retrofit.runtime.versions import current_versions

__all__ = ["PROBE", "RECORD", "ExportRequest", "export", "plan_export", "verify_export"]

SPARSE_ENOUGH = 1.5  # times the work that the patch needs
SAME = 1e-6  # relative distance from dense that rounding alone can make


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What is asked of an export.

    Attributes:
        format: `pt2` or `onnx`.
        portable: Whether it must run without retrofit: a graph of PyTorch's own operators.
        dynamic_batch: Whether the number of rows may change.
        size: Of the inputs; what is left out is the network's own.
        device: Where it is traced.
        dtype: Of the weights; None keeps the checkpoint's own.
        seed: Of the probe.
        trust_remote_code: Whether code that comes with the checkpoint may run.
    """

    format: str
    portable: bool = False
    dynamic_batch: bool = False
    size: AskedSize = AskedSize()  # noqa: RUF009 - frozen
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    trust_remote_code: bool = False


def plan_export(
    checkpoint: Checkpoint,
    what: Recipe | Method | str | None,
    request: ExportRequest,
    **parameters: Any,
) -> Plan:
    """Work out, on configs alone, whether a patched network can be exported.

    Args:
        checkpoint: A source, or one that `retrofit patch` wrote.
        what: The method or recipe for a source; None for a patched one.
        request: What is asked.
        parameters: Settings of the method.

    Raises:
        InputError: If it can't be, by name.
    """
    _check_format(request)
    if checkpoint.manifest is not None:
        if what is not None:
            raise InputError(
                f"{checkpoint.name}: already patched. Leave --method and --recipe out."
            )
        if checkpoint.manifest.has_learned or _is_tuned(checkpoint):
            raise UnsupportedError(
                f"{checkpoint.name}: has learned parts or fine-tuned weights, which exports don't "
                "hold yet. Export another patch."
            )
        what = Recipe.from_dict(checkpoint.manifest.recipe)
        checkpoint = replace(checkpoint, manifest=None)
    if what is None:
        raise InputError(f"{checkpoint.name}: not patched. Add --method or --recipe.")
    plan = plan_patch(checkpoint, what, trust_remote_code=request.trust_remote_code, **parameters)
    networks = [network for network, _ in plan.handle.networks]
    if len(networks) != 1:
        names = ", ".join(network.where("") for network in networks)
        raise UnsupportedError(
            f"{checkpoint.name}: expected one network to export, got {names}. Name one with "
            "--component."
        )
    for rule in plan.recipe.rules:
        if rule.method.needs_steps or rule.steps:
            raise UnsupportedError(
                f"{rule.method.name}: changes with the step of a denoising run, and a graph holds "
                "one step. Take a method or a recipe that is the same at every step."
            )
    return plan


def export(
    plan: Plan,
    request: ExportRequest,
    out: Path,
    *,
    force: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Write an export into a new folder, and prove it in a fresh process.

    Args:
        plan: Of the patch, from `plan_export`.
        request: What is asked.
        out: The new folder: the artefact, `export.json`, its probe and a card.
        force: Replace an earlier result.
        say: Told what is going on.

    Returns:
        The record, as `export.json` holds it.

    Raises:
        InputError: If it can't be exported.
        VerificationError: If what was written is not the patched network, or not sparse.
    """
    kind = FORMATS[request.format]
    portable = request.portable or kind.portable_only
    refuse_output(
        out,
        plan.checkpoint.file or plan.checkpoint.root,
        force=force,
        names={RECORD, PROBE, CARD, kind.file, f"{kind.file}.data"},
        check_earlier=read_record,
    )
    with new_folder(out, replace=force) as folder:
        say("loading and measuring the network ...")
        subject = open_subject(
            plan,
            request.size,
            device=request.device,
            dtype=request.dtype,
            batch=2 if request.dynamic_batch else 1,
            seed=request.seed,
            trust_remote_code=request.trust_remote_code,
        )
        patched, dense = subject.run(), run_dense(subject)
        work = count_work(subject)
        _refuse_dense(subject, distance(patched, dense))
        seconds = time_eager(subject)
        say(f"exporting to {request.format} ...")
        with plain_operators() if portable else nullcontext():
            program = trace(subject, request.dynamic_batch)
        _refuse_wrong(subject, program, work, portable=portable)
        told = kind.write(program, subject, folder / kind.file)
        _write_probe(subject, patched, folder / PROBE)
        record = {
            "schema": SCHEMA,
            "format": request.format,
            "portable": portable,
            "dynamic": ["batch"] if request.dynamic_batch else [],
            "source": public_name(plan.checkpoint),
            "component": subject.network.name,
            "family": subject.network.family.name,
            "recipe": plan.recipe.to_dict(),
            "dtype": subject.dtype,
            "inputs": {
                name: {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
                for name, x in flatten(subject.inputs).items()
            },
            "work": work,
            "difference_from_dense": distance(patched, dense),
            "versions": current_versions(),
            **told,
        }
        _write_json(folder / RECORD, record)
        say("running it, and the dense network in the same format, in fresh processes ...")
        record["verified"] = run_alone(folder)
        require_same(out, record)
        seconds["exported"] = record["verified"]["seconds"]
        seconds["exported_dense"] = _time_dense(subject, dense, request, record)
        record["seconds"] = seconds
        _write_json(folder / RECORD, record)
        (folder / CARD).write_text(make_card(record, kind.file), encoding="utf-8")
    return record


def _time_dense(
    subject: Subject, dense: tuple[Tensor, ...], request: ExportRequest, record: dict[str, Any]
) -> float:
    """Seconds of the network without its patch in the same format, in a process of its own."""
    kind = FORMATS[request.format]
    with TemporaryDirectory() as place, subject.handle.disabled():
        folder = Path(place)
        program = trace(subject, request.dynamic_batch)
        told = kind.write(program, subject, folder / kind.file)
        _write_probe(subject, dense, folder / PROBE)
        _write_json(folder / RECORD, {**record, "portable": True, **told})
        return float(run_alone(folder)["seconds"])


def _check_format(request: ExportRequest) -> None:
    if request.format not in FORMATS:
        raise NotFoundError(
            f"--format {request.format}: expected {' or '.join(FORMATS)}. "
            f"{suggest(request.format, FORMATS)}"
        )
    need = FORMATS[request.format].needs
    for package in (need, "onnxscript") if need else ():
        if package is not None and importlib.util.find_spec(package) is None:
            raise UnsupportedError(
                f"--format {request.format}: needs {package}, which is not installed: "
                f"pip install {package}"
            )


def _is_tuned(checkpoint: Checkpoint) -> bool:
    return getattr(checkpoint.manifest, "tuned", None) is not None


def _refuse_dense(subject: Subject, difference: float) -> None:
    """Refuse a patch that changes nothing.

    Raises:
        UnsupportedError: If it is so at this size.
    """
    recipe = subject.plan.recipe
    if not recipe.is_exact and difference <= SAME:
        raise UnsupportedError(
            f"{recipe.explain_no_change(str(subject.size))} Export it at a larger size."
        )


def _refuse_wrong(
    subject: Subject, program: ExportedProgram, work: dict[str, Any], *, portable: bool
) -> None:
    """Refuse a graph that reads what is hidden, or that is not sparse; notes its work.

    Raises:
        UnsupportedError: With how much it would do.
    """
    methods = subject.plan.recipe.methods
    if not is_mask_honoured(subject, program):
        raise UnsupportedError(
            f"{methods}: its graph would read what the attention mask hides. Take another method."
        )
    if not portable:
        return
    work["exported"] = count_graph(subject, program)
    if work["exported"] > SPARSE_ENOUGH * work["ideal"]:
        raise UnsupportedError(
            f"{methods}: without retrofit's operators it would do "
            f"{work['exported'] / work['ideal']:.1f} times the work that the patch needs (dense: "
            f"{work['dense'] / work['ideal']:.1f}). Take --format pt2 without --portable."
        )


def _write_probe(subject: Subject, outputs: tuple[Tensor, ...], file: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"in.{name}": x for name, x in flatten(subject.inputs).items()}
    tensors |= {f"out.{i}": x for i, x in enumerate(outputs)}
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, file)


def _write_json(file: Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=2, default=asdict) + "\n", encoding="utf-8")
