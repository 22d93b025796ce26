"""Peak memory, each variant in a fresh process of its own."""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retrofit.evaluate import Progress
from retrofit.evaluate.measure import ModelInput, find_module, run_input
from retrofit.evaluate.result import Comparison
from retrofit.patching.patch import patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.child_process import run_child
from retrofit.runtime.errors import RetrofitError
from retrofit.runtime.memory import empty_cache, peak_memory, restart_peak


@dataclass(frozen=True, kw_only=True)
class MemoryJob:
    """What a child process opens and runs.

    Attributes:
        open_target: Picklable, gives the model or pipeline; both variants open it alike.
        recipe: What to patch, as plain data; None for the dense model.
        inputs: Run one after the other, twice.
        components: Networks of a pipeline that inputs are for.
    """

    open_target: Callable[[], Any]
    recipe: dict[str, Any] | None
    inputs: tuple[ModelInput, ...]
    components: tuple[str, ...] = ()


def measure_peak_memory(job: MemoryJob) -> int:
    """Peak memory, in bytes, of a fresh process that opens a model and runs it.

    On an accelerator it is what its allocator gave out. Elsewhere it is the largest resident size
    from the moment the model is open; where the system can't restart that mark, of the process's
    whole life.

    Raises:
        RetrofitError: If the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.pickle"
        file.write_bytes(pickle.dumps(job))
        # it imports what this process does, and nothing from where the user happens to stand
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = run_child("retrofit.evaluate.peak_memory", [str(file)], environment=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RetrofitError(
            f"peak memory: the measuring process ended with {done.returncode} ({last[0]}). "
            "Compare without memory, or on smaller inputs."
        )
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _run_job(job: MemoryJob) -> int:
    target = job.open_target()
    runs = [(find_module(target, item, job.components), item) for item in job.inputs]
    handle = None if job.recipe is None else patch(target, Recipe.from_dict(job.recipe))
    device = next(runs[0][0].parameters()).device
    restart_peak(device)
    with torch.no_grad():
        for module, item in (*runs, *runs):
            run_input(module, item, handle)
    return peak_memory(device)


def with_peak_memory(
    comparison: Comparison,
    open_target: Callable[[], Any],
    inputs: Sequence[ModelInput],
    *,
    components: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Comparison:
    """The same comparison with every variant's peak memory, each measured in a fresh process.

    Args:
        comparison: What `compare_models` gave.
        open_target: Picklable; opens the target as every child process does.
        inputs: What each child runs; one, the largest, is enough.
        components: As for `compare_models`.
        progress: Called as `progress(what, done, total)`.
    """
    gc.collect()  # models hold cycles; what this process has freed is there for its children
    empty_cache()
    rows = []
    for i, row in enumerate(comparison.rows):
        if progress is not None:
            progress(f"peak memory of {row.name}", i, len(comparison.rows))
        recipe = None if row.recipe is None else row.recipe.to_dict()
        job = MemoryJob(
            open_target=open_target, recipe=recipe, inputs=tuple(inputs), components=components
        )
        rows.append(replace(row, peak_bytes=measure_peak_memory(job)))
    return replace(comparison, rows=tuple(rows))


if __name__ == "__main__":
    peak = _run_job(pickle.loads(Path(sys.argv[1]).read_bytes()))
    sys.stdout.write(json.dumps({"peak_bytes": peak}) + "\n")
