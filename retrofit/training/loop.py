"""The training loop: steps, looks at held-out rows, states on disk, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.families.training import Step
from retrofit.runtime.errors import NonFiniteError, StoppedError, TrainingError
from retrofit.runtime.interrupts import raise_if_interrupted, shielded
from retrofit.training.gates import GateObserver
from retrofit.training.log import RunLog
from retrofit.training.optimizer import learning_rate, make_optimizer
from retrofit.training.outcome import ALONE, Outcome, Running
from retrofit.training.prepare import (
    checkpoint_activations,
    cut_batch,
    refuse_sharding,
    silence_dropout,
)
from retrofit.training.request import FinetuneRequest
from retrofit.training.rows import Dataset, deal, take
from retrofit.training.samples import read_prompts
from retrofit.training.selection import select
from retrofit.training.sources import Source
from retrofit.training.state import (
    find_states,
    forget_states,
    load_state,
    pack_optimizer,
    save_state,
    unpack_optimizer,
)
from retrofit.training.teacher import Teacher, swapped
from retrofit.training.validation import Scores, Validator

STRIDE = 1_000_003  # between the seeds of two runs' steps
REQUEST = "request.json"


class Trainer:
    """One fine-tune, from step 0 or from a state on disk."""

    def __init__(
        self,
        source: Source,
        dataset: Dataset,
        request: FinetuneRequest,
        folder: Path,
        *,
        running: Running = ALONE,
    ) -> None:
        """Make ready what learns.

        Args:
            source: The patched network, changed in place.
            dataset: Rows to learn from, and those held out.
            request: What is asked, with a learning rate.
            folder: Of states and the log.
            running: How it runs.

        Raises:
            InputError: If nothing could learn, or not in this way.
        """
        from accelerate import Accelerator

        self.source, self.dataset, self.request, self.folder = source, dataset, request, folder
        self.running, self.report = running, running.report
        network = source.network.module
        cpu = next(network.parameters()).device.type == "cpu"
        precision = request.precision or ("no" if cpu else "bf16")
        self.accelerator = Accelerator(
            mixed_precision=precision, cpu=cpu, log_with=running.tracker, project_dir=folder
        )
        refuse_sharding(self.accelerator, request)
        self.device = self.accelerator.device
        self.trained = select(network, source.handle, request)
        self.put_back = silence_dropout(network, checkpointing=request.checkpointing)
        if request.checkpointing:
            checkpoint_activations(network)
        self.teacher = Teacher(source.handle, self.trained)
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.module: nn.Module = self.accelerator.prepare(network)
        self.optimizer: Any = self.accelerator.prepare(make_optimizer(self.trained, request))
        self.validator = Validator(
            source.owner, source.training, dataset.held_out, batch=request.batch, seed=request.seed
        )
        self.log = RunLog(self.accelerator, folder, running.tracker)
        self.step = 0
        self.looks: dict[int, Scores] = {}

    def run(self) -> Outcome:
        """Train to the last step.

        Raises:
            TrainingError: If the held-out loss rises above where it began, or is NaN; the last
                good state is kept.
            StoppedError: At Ctrl-C, or where the time is over, after a state was written.
        """
        began = time.perf_counter()
        self.log.begin(self.request.to_dict())
        order = deal(self.dataset, self.request.steps, self.request.batch, self.request.seed)
        with self.teacher.active():
            dense = self.validator.look_at_teacher(self._predict, self.device)
        if self.running.resume:
            self._resume()
        if self.step not in self.looks and self._is_due(self.request.validation_interval):
            self._look()
        seconds, first = 0.0, self.step
        try:
            while self.step < self.request.steps:
                started = time.perf_counter()
                loss = self._update(*order[self.step])
                seconds += time.perf_counter() - started
                self.report("training", self.step, self.request.steps)
                self.log.write(self.step, loss=loss, lr=learning_rate(self.request, self.step))
                if self._is_due(self.request.validation_interval):
                    self._look()
                if self._is_due(self.request.save_interval):
                    self.save()
                self._stop_in_time(time.perf_counter() - began)
        except NonFiniteError as error:
            raise TrainingError(self._told(str(error).rstrip("."))) from error
        except (KeyboardInterrupt, SystemExit) as signal:
            with shielded():
                self.save()
            stopped = StoppedError(self._stopped("by a signal"))
            if isinstance(signal, SystemExit):
                stopped.exit_code = int(signal.code or 0)
            raise stopped from None
        with swapped(self.trained, self._kept()):
            weights = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
        self.put_back()
        return Outcome(
            weights=weights,
            dense=dense,
            looks=self.looks,
            seconds=seconds,
            steps_run=self.step - first,
        )

    @contextmanager
    def holding(self, outcome: Outcome) -> Iterator[None]:
        """While entered, the network has the weights that a run came to."""
        values = {n: x.to(self.trained[n].device) for n, x in outcome.weights.items()}
        with swapped(self.trained, values):
            yield

    def save(self) -> None:
        """Write the state of this step."""
        if not self.accelerator.is_main_process:
            return
        packed, facts = pack_optimizer(self.optimizer.optimizer)
        tensors: dict[str, Tensor] = {f"weights.{n}": p for n, p in self.trained.items()}
        tensors |= {f"average.{n}": x for n, x in self.average.items()}
        tensors |= {f"optimizer.{n}": x for n, x in packed.items()}
        looks = {str(step): asdict(scores) for step, scores in self.looks.items()}
        save_state(
            self.folder, self.step, tensors, {"step": self.step, "optimizer": facts, "looks": looks}
        )
        forget_states(self.folder, self.request.keep_states)

    def _stop_in_time(self, seconds: float) -> None:
        """Leave with a state where another step would pass the limit."""
        limit = self.running.time_limit
        over = limit is not None and seconds > limit
        if not self._any(over) or self.step == self.request.steps:
            return
        self.save()
        raise StoppedError(self._stopped(f"after {(limit or 0.0) / 60:g} minutes"))

    def _stopped(self, why: str) -> str:
        return (
            f"stopped {why} after step {self.step} of {self.request.steps}, with a state in "
            f"{self.folder}. Go on with the same command and --resume."
        )

    def _any(self, flag: bool) -> bool:
        """Whether it holds on any process, so that all of them do the same."""
        if self.accelerator.num_processes == 1:
            return flag
        told = torch.tensor(float(flag), device=self.device)
        return float(self.accelerator.reduce(told, "sum")) > 0

    def _resume(self) -> None:
        states = find_states(self.folder)
        if not states:
            return
        tensors, facts = load_state(states[-1])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
        packed = {
            name.removeprefix("optimizer."): value
            for name, value in tensors.items()
            if name.startswith("optimizer.")
        }
        unpack_optimizer(self.optimizer.optimizer, packed, facts["optimizer"])
        self.step = int(facts["step"])
        self.looks = {int(step): Scores(**scores) for step, scores in facts["looks"].items()}

    def _update(self, bucket: int, index: Tensor) -> float:
        """One optimizer step on the rows of a batch; its loss, over all processes."""
        request, total = self.request, 0.0
        rows = take(self.dataset.train[bucket], index)
        generator = torch.Generator().manual_seed(request.seed * STRIDE + self.step + 1)
        step = self.source.training.draw(self.source.owner, rows, generator)
        parts = list(self._parts(step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.request, self.step) * group["scale"]
        for i, part in enumerate(parts):
            with self._synchronised(i == len(parts) - 1):
                loss = self._loss(part) / len(parts)
                self.accelerator.backward(loss)
            total += float(loss.detach())
        total = float(self.accelerator.reduce(torch.tensor(total, device=self.device), "mean"))
        if not math.isfinite(total):
            raise TrainingError(self._told(f"the loss is {total}"))
        self.accelerator.clip_grad_norm_(list(self.trained.values()), request.clip)
        with shielded():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._follow()
            self.step += 1
        raise_if_interrupted()
        return total

    def _parts(self, step: Step) -> Iterator[Step]:
        """This process's share of a batch, in the parts that are run one by one."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.request.batch // (world * self.request.grad_accum)
        for i in range(self.request.grad_accum):
            start = (rank * self.request.grad_accum + i) * size
            yield cut_batch(step, slice(start, start + size), self.device)

    def _loss(self, step: Step) -> Tensor:
        if self.request.train == "gates":
            return self._gate_loss(step)
        training, kind = self.source.training, self.request.objective
        wanted = [] if step.target is None or kind == "distill" else [step.target]
        if kind != "denoise":
            with self.teacher.active():
                wanted.append(self._predict(step))
        prediction = self._predict(step)
        losses = [training.error(prediction, other, step.arguments) for other in wanted]
        return (step.weight * torch.stack(losses).sum(0)).mean()

    def _gate_loss(self, step: Step) -> Tensor:
        observer = GateObserver(self.source.handle)
        with self.source.handle.observe(observer), torch.no_grad():
            self._predict(step)
        return observer.mean()

    def _predict(self, step: Step) -> Tensor:
        with self.accelerator.autocast():
            return self.source.training.read(self.module(**step.arguments, **step.shared))

    def _look(self) -> None:
        """Scores of this step; stops the run where they are worse than at the start."""
        if self.step == 0:
            self.report("scoring held-out samples", 0, 1)
        with swapped(self.trained, self._kept()), torch.no_grad():
            scores = self.validator.look(self._predict, self.device)
            self._show()
        kind = self.request.objective
        start = self.looks.get(0, scores).objective(kind)
        now = scores.objective(kind)
        if self._any(not math.isfinite(now) or now > start):
            raise TrainingError(
                self._told(f"the held-out loss is {now:.4g}, above the {start:.4g} it began with")
            )
        self.looks[self.step] = scores
        self.log.write(self.step, held_out=asdict(scores))

    def _show(self) -> None:
        """Draw the captions of `--validation-prompts` as the network is now."""
        show, file = self.source.training.show, self.request.validation_prompts
        if file is None or show is None or not self.accelerator.is_main_process:
            return
        from retrofit.sampling.contact_sheet import SheetRow, write_sheet

        pictures = show(self.source.owner, read_prompts(file), self.request.seed)
        row = SheetRow(f"step {self.step}", f"seed {self.request.seed}", pictures)
        write_sheet([row], self.folder / "pictures" / f"step-{self.step:07d}.png")

    def _told(self, what: str) -> str:
        states = find_states(self.folder)
        kept = f"the last good state is {states[-1]}" if states else "no state was written yet"
        return f"stopped at step {self.step}: {what}; {kept}. Lower --lr."

    def _follow(self) -> None:
        if self.request.ema:
            average = list(self.average.values())
            now = [p.data for p in self.trained.values()]
            with torch.no_grad():
                torch._foreach_lerp_(average, now, 1 - self.request.ema)

    def _kept(self) -> dict[str, Tensor]:
        """The weights that count: the running average, or those that were trained last."""
        if self.request.ema:
            return self.average
        return {name: p.data for name, p in self.trained.items()}

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.request.steps

    @contextmanager
    def _synchronised(self, is_last: bool) -> Iterator[None]:
        """Gradients are exchanged between processes with the last part only."""
        if is_last:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield
