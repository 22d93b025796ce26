"""What a run writes while it goes: lines of JSON, and a tracker where one is asked for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from retrofit.runtime.errors import InputError, UnsupportedError

LOG = "log.jsonl"
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # by the package that each needs


class RunLog:
    """One line a step in `log.jsonl`, and the same numbers for TensorBoard or W&B."""

    def __init__(self, accelerator: Any, folder: Path, tracker: str | None) -> None:
        """Keep where lines go."""
        self.accelerator, self.folder, self.tracker = accelerator, folder, tracker

    def begin(self, facts: dict[str, Any]) -> None:
        """Open the tracker with the settings of the run."""
        if self.tracker is not None:
            plain = {n: v if isinstance(v, (int, float)) else str(v) for n, v in facts.items()}
            self.accelerator.init_trackers("retrofit", config=plain)

    def write(self, step: int, **entry: Any) -> None:
        """One line."""
        if self.tracker is not None:
            numbers = {**entry, **entry.get("held_out", {})}
            told = {name: value for name, value in numbers.items() if isinstance(value, float)}
            self.accelerator.log(told, step=step)
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **entry}) + "\n")


def refuse_tracker(tracker: str | None) -> None:
    """Find out before a long run that a tracker's package is missing.

    Raises:
        InputError: If it is, or if it is none that is known.
    """
    if tracker is None:
        return
    if tracker not in TRACKERS:
        raise InputError(f"--tracker {tracker}: expected {' or '.join(TRACKERS)}.")
    if importlib.util.find_spec(TRACKERS[tracker]) is None:
        raise UnsupportedError(
            f"--tracker {tracker}: needs {TRACKERS[tracker]}, which is not installed: "
            f"pip install {TRACKERS[tracker]}"
        )
