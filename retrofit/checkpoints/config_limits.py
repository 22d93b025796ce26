"""Numbers in a config that no network has, refused before anything of that size is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrofit.runtime.errors import CheckpointError

CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
LIMITS = (  # far above the largest networks there are; the first that fits a key counts
    (re.compile(r"(^|_)(n_?)?(layers?|depths?|num_blocks|experts)(_|$)"), 10_000),
    (re.compile(r"(^|_)(labels|heads|groups)$"), 1_000_000),
    (re.compile(r"^(sample|image|img|patch)_(size|height|width)$|_timesteps$"), 100_000),
    (re.compile(r"(^|_)(size|dim|channels?|features|len|length|embeddings|states)(_|$)"), 2**31),
)
MOST_LEVELS = 50


def check_numbers(config: Any, file: Path) -> None:
    """Refuse sizes and counts that would fill the memory or take hours to build.

    Args:
        config: What a config file holds.
        file: For the message.

    Raises:
        CheckpointError: With the key, its value and the limit.
    """
    for key, number, limit in _numbers("", config, 0, file):
        if number > limit:
            raise CheckpointError(
                f"{file}: {key}: expected at most {limit}, got {_short(number)}. "
                "Fetch the checkpoint again."
            )


def _numbers(key: str, value: Any, level: int, file: Path) -> Iterator[tuple[str, int, int]]:
    """Every whole number whose key has a limit, and the lengths of such lists."""
    if level > MOST_LEVELS:
        raise CheckpointError(f"{file}: nested too deep. Fetch the checkpoint again.")
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(str(name), item, level + 1, file)
        return
    limit = next((most for pattern, most in LIMITS if pattern.search(key)), None)
    if isinstance(value, list):
        if limit is not None:
            yield f"length of {key}", len(value), min(limit, 1_000_000)
        for item in value:
            yield from _numbers(key, item, level + 1, file)
    elif limit is not None and isinstance(value, int):
        yield key, value, limit


def _short(number: int) -> str:
    return str(number) if number < 10**20 else "a number of more than 20 digits"
