"""Short fine-tunes of a patched network against its dense teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.artifact.planning import Plan
from retrofit.artifact.saving import refuse_target
from retrofit.artifact.tuned import Tuned, find_places, write_tuned
from retrofit.checkpoints import read_json
from retrofit.checkpoints.manifest import Manifest
from retrofit.runtime.errors import InputError
from retrofit.training.log import LOG
from retrofit.training.loop import REQUEST, Trainer
from retrofit.training.outcome import ALONE, Outcome, Running
from retrofit.training.report import make_card, make_record
from retrofit.training.request import FinetuneRequest, read_request
from retrofit.training.samples import count_samples
from retrofit.training.selection import adapter_config
from retrofit.training.sources import open_source, plan_finetune, read_dataset
from retrofit.training.state import find_states

__all__ = [
    "Finetuned",
    "Outcome",
    "Running",
    "finetune",
    "plan_finetune",
    "read_request",
    "work_folder",
]

CACHE = "cache"  # of encoded samples


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What `finetune` did.

    Attributes:
        outcome: Of the training.
        manifest: Of the written checkpoint; None on the processes that write nothing.
        num_train: Samples it learned from.
        num_held_out: Samples that were held out.
        num_parameters: That learned.
        folder: Of the log and the encoded samples.
    """

    outcome: Outcome
    manifest: Manifest | None
    num_train: int
    num_held_out: int
    num_parameters: int
    folder: Path


def work_folder(out: Path) -> Path:
    """Where states, log and encoded samples lie: beside the output."""
    return out.with_name(f"{out.name}-training")


def finetune(
    plan: Plan, request: FinetuneRequest, out: Path, running: Running = ALONE
) -> Finetuned:
    """Fine-tune a patched network for a while, and write what comes out.

    Args:
        plan: Of the patch, from `plan_finetune`.
        request: What is asked, with a learning rate.
        out: The new folder.
        running: How it runs.

    Raises:
        InputError: If it can't be done, or the state on disk is of another request.
        TrainingError: If the held-out loss rises above where it began, or is NaN.
        StoppedError: If it was stopped; it can be gone on with.
    """
    from accelerate import PartialState

    state = PartialState(cpu=running.device == "cpu")
    folder = work_folder(out)
    count_samples(plan, request)
    if state.is_main_process:
        refuse_target(plan, out, force=running.force)
        _take_folder(folder, request, resume=running.resume)
    state.wait_for_everyone()
    device = running.device if state.num_processes == 1 else str(state.device)
    source = open_source(plan, request, device=device, trust_remote_code=running.trust_remote_code)
    try:
        with state.main_process_first():  # the others read what it has encoded
            dataset = read_dataset(source, request, folder / CACHE, running.report)
        trainer = Trainer(source, dataset, request, folder, running=running)
    except InputError:
        if state.is_main_process and not find_states(folder):
            shutil.rmtree(folder)
        raise
    component = source.network.component
    if request.train in ("all", "attention"):
        find_places(plan, component, trainer.trained)
    outcome = trainer.run()
    manifest = None
    if state.is_main_process:
        tuned = Tuned(
            record=make_record(plan, [component], request, outcome),
            card=make_card(plan, request, outcome),
            **_results(trainer, request, component, outcome),
        )
        running.report("writing", 0, 1)
        manifest = write_tuned(
            plan, out, tuned, device=device, seed=request.seed, force=running.force
        )
    state.wait_for_everyone()
    trainer.accelerator.end_training()
    return Finetuned(
        outcome=outcome,
        manifest=manifest,
        num_train=dataset.num_train,
        num_held_out=dataset.num_held_out,
        num_parameters=sum(x.numel() for x in outcome.weights.values()),
        folder=folder,
    )


def _results(
    trainer: Trainer, request: FinetuneRequest, component: str, outcome: Outcome
) -> dict[str, Any]:
    """What was learned, as `Tuned` takes it."""
    if request.train == "gates":
        handle = trainer.source.handle
        with trainer.holding(outcome):
            return {
                "learned": {n: x.detach().cpu().clone() for n, x in handle.state_dict().items()}
            }
    if request.train == "lora":
        from peft import get_peft_model_state_dict

        network = trainer.source.network.module
        with trainer.holding(outcome):
            state = get_peft_model_state_dict(network, adapter_name="retrofit")
            tensors = {f"base_model.model.{n}": x.detach().cpu().clone() for n, x in state.items()}
        return {"adapter": (_plain(adapter_config(network)), tensors)}
    return {"weights": {component: outcome.weights}}


def _plain(config: Any) -> dict[str, Any]:
    """A peft config as JSON holds it."""
    data = config.to_dict()
    return dict(
        json.loads(json.dumps(data, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))
    )


def _take_folder(folder: Path, request: FinetuneRequest, *, resume: bool) -> None:
    """Take the folder of a run, or make it.

    Raises:
        InputError: If a run lies there that is not to be gone on with, or is another one.
    """
    file, asked = folder / REQUEST, request.to_dict()
    if not file.is_file() or not find_states(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).unlink(missing_ok=True)
        file.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        return
    if not resume:
        raise InputError(
            f"{folder}: holds an earlier run. Go on with --resume, delete it, or give another -o."
        )
    earlier = read_json(file)
    other = [
        f"{name} ({earlier.get(name)!r}, now {value!r})"
        for name, value in asked.items()
        if earlier.get(name) != value
    ]
    if other:
        raise InputError(
            f"--resume: the run in {folder} has other settings: {', '.join(other)}. Give the same."
        )
