"""What a user asks of a fine-tune, checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from retrofit.runtime.errors import ConfigError, unknown_key
from retrofit.runtime.schema import Within, find_problems

Fraction = Annotated[float, Within(0, 1)]
Count = Annotated[int, Within(1, 10**9)]


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """Everything that decides the result of a fine-tune, the model and the patch aside.

    Attributes:
        data: A folder, a CSV or JSONL file, a text file, or `self`: samples of the dense model.
        prompts: A file with a caption a line, of which `self` makes samples.
        samples: How many are used, or made; None takes all, or 256.
        size: Width and height in pixels; None is the training size.
        tokens: Length at which texts are cut; None is the longest that the model takes, 512 at
            most.
        steps: Optimizer steps.
        batch: Samples of one step, over all processes.
        grad_accum: Parts in which a step's batch is run, to save memory.
        train: What learns: everything, the attention modules, LoRA layers in them, or the method's
            own gates.
        rank: Of LoRA.
        objective: The model's own loss, the distance from the dense model, or both, one to one.
        lr: The highest learning rate; None is the recipe's.
        warmup: Steps over which it rises; a tenth of all at most.
        decay: Part of the steps, at the end, over which it falls to zero.
        ema: Decay of a running average of the weights, which is what is kept; 0 keeps the weights.
        optimizer: `adamw`, `adamw8bit` (needs bitsandbytes) or `prodigy` (needs prodigyopt).
        clip: Largest norm of the gradients.
        precision: `bf16`, `fp16` or `no`; None is bf16 on an accelerator and `no` on a CPU.
        checkpointing: Whether activations are computed again in the backward, to save memory.
        held_out: Samples that are never trained on.
        validation_prompts: A file with a caption a line, of which pictures are drawn at every look.
        validate_every: Steps between two looks at them; None is a tenth of all.
        save_every: Steps between two states on disk; None is as often as it looks.
        keep_states: How many of them stay on the disk.
        seed: Of everything drawn.
    """

    data: str
    prompts: str | None = None
    samples: Count | None = None
    size: tuple[int, int] | None = None
    tokens: Count | None = None
    steps: Count = 500
    batch: Count = 8
    grad_accum: Count = 1
    train: Literal["all", "attention", "lora", "gates"] = "all"
    rank: Count = 16
    objective: Literal["denoise", "distill", "both"] = "both"
    lr: Annotated[float, Within(0, 10)] | None = None
    warmup: Annotated[int, Within(0, 10**9)] = 20
    decay: Fraction = 0.4
    ema: Fraction = 0.0
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    clip: Annotated[float, Within(0, 10**6)] = 1.0
    precision: Literal["bf16", "fp16", "no"] | None = None
    checkpointing: bool = False
    held_out: Count = 64
    validation_prompts: str | None = None
    validate_every: Count | None = None
    save_every: Count | None = None
    keep_states: Count = 2
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0

    @property
    def validation_interval(self) -> int:
        """Steps between two looks at the held-out samples."""
        return self.validate_every or max(1, self.steps // 10)

    @property
    def save_interval(self) -> int:
        """Steps between two states on disk."""
        return self.save_every or self.validation_interval

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for records."""
        data = dataclasses.asdict(self)
        return {**data, "size": None if self.size is None else list(self.size)}


FIELDS = tuple(field.name for field in dataclasses.fields(FinetuneRequest))


def read_request(given: Mapping[str, Any], where: str = "finetune") -> FinetuneRequest:
    """A request from plain data.

    Args:
        given: Values by name; None counts as not given.
        where: For messages.

    Raises:
        ConfigError: With every mistake at once.
    """
    given = {name: value for name, value in given.items() if value is not None}
    problems = [unknown_key(name, FIELDS, "setting") for name in given if name not in FIELDS]
    hints = typing.get_type_hints(FinetuneRequest, include_extras=True)
    for name in given.keys() & hints.keys():
        problems += [f"{text}." for text in find_problems(given[name], hints[name], name)]
    if "data" not in given:
        problems.append("no data: expected a folder, a file or `self`. Add --data.")
    if problems:
        raise ConfigError(f"{where}: {' '.join(problems)}")
    if "size" in given:
        given["size"] = tuple(given["size"])  # JSON and YAML have lists
    request = FinetuneRequest(**given)
    if request.batch % request.grad_accum:
        raise ConfigError(
            f"{where}: grad_accum {request.grad_accum} does not divide batch {request.batch}. "
            "Give a batch that is a multiple of it."
        )
    return request
