"""A fine-tune as it is typed: options, NAME=VALUE words, and a YAML file with the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrofit.commands.options import as_number, read_assignment, read_size, read_value
from retrofit.runtime.errors import ConfigError, unknown_key
from retrofit.runtime.reading import YAML_BYTES, parse_yaml, read_text
from retrofit.runtime.schema import find_problems

SHAPE: dict[str, Any] = {
    "model": str,
    "method": str,
    "recipe": str,
    "set": Mapping[str, Any],
    "sites": list[str],
    "out": str,
}
TEXTS = ("model", "method", "recipe", "out", "data", "prompts", "validation_prompts")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Which model is fine-tuned, with what patch, and where the result goes.

    Attributes:
        model: A checkpoint, patched or not.
        method: Name of a method.
        recipe: A recipe's file or name.
        settings: Of the method.
        sites: Globs over site paths.
        out: The new folder.
        request: Settings of the fine-tune that were given.
    """

    model: str | None = None
    method: str | None = None
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    out: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)


def read_job(config: str | Path | None, words: Sequence[str], given: Mapping[str, Any]) -> Job:
    """What is typed on top of what a file says.

    Args:
        config: A YAML file, or None.
        words: As `lr=1e-4` or `set.keep=0.1`.
        given: Options by name; None counts as not given.

    Raises:
        ConfigError: If a name is unknown or a value of the wrong type.
    """
    from retrofit.training.request import FIELDS

    data = {} if config is None else _read_config(config)
    options = {name: value for name, value in given.items() if value not in (None, [], {})}
    settings = {**(data.get("set") or {}), **options.pop("set", {})}
    data |= options
    for word in words:
        name, text = read_assignment(word, "", "lr=1e-4")
        value = text.strip() if name in TEXTS else read_value(text, word)
        if name.startswith("set."):
            settings[name.removeprefix("set.")] = value
        else:
            data[name] = value
    data["set"] = settings
    if isinstance(data.get("size"), str):
        data["size"] = list(read_size(data["size"]))
    _check(data, (*SHAPE, *FIELDS), "finetune" if config is None else f"--config {config}")
    return Job(
        settings=settings,
        sites=tuple(data.get("sites") or ()),
        request={name: data[name] for name in FIELDS if name in data},
        **{name: data.get(name) for name in ("model", "method", "recipe", "out")},
    )


def _read_config(file: str | Path) -> dict[str, Any]:
    try:
        data = parse_yaml(read_text(Path(file).expanduser(), YAML_BYTES))
    except (OSError, UnicodeError, ValueError) as error:
        raise ConfigError(f"--config {file}: expected a YAML file: {error}.") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"--config {file}: expected settings by name, got {data!r}.")
    named = {str(name): value for name, value in data.items()}
    return {n: v if n in TEXTS else as_number(v) for n, v in named.items()}


def _check(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    problems = [unknown_key(name, known, "setting") for name in data if name not in known]
    for name, hint in SHAPE.items():
        if data.get(name) is not None:
            problems += [f"{text}." for text in find_problems(data[name], hint, name)]
    if problems:
        raise ConfigError(f"{where}: {' '.join(problems)}")
