"""A rule of a recipe: which method acts at which sites, heads and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrofit.methods import METHODS, Method
from retrofit.patching.settings import as_plain_data, make_method
from retrofit.runtime.errors import suggest, unknown_key

RULE_KEYS = ("method", "parameters", "sites", "heads", "steps")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One method at some sites, heads and steps.

    Attributes:
        method: A method's config.
        sites: Globs over site paths (`down_blocks.*`, `unet.*.attn1`); `!` in front excludes. Empty
            means every site that the method takes.
        heads: Query heads it acts on, from 0; the others stay dense or are another rule's. Empty
            means all.
        steps: Fractions of the denoising steps between which it acts, `(0.2, 1.0)` leaves the first
            fifth dense; None means all, and in networks without steps always.
    """

    method: Method
    sites: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()
    steps: tuple[float, float] | None = None

    def acts_at(self, step: int, num_steps: int) -> bool:
        """Whether it acts at a step."""
        if self.steps is None:
            return True
        first, last = (int(fraction * num_steps + 0.5) for fraction in self.steps)
        return first <= step < last

    def overlaps(self, other: Rule) -> bool:
        """Whether both act on a head at a step, at a site that both take."""
        if self.heads and other.heads and not set(self.heads) & set(other.heads):
            return False
        spans = [rule.steps or (0.0, 1.0) for rule in (self, other)]
        return max(span[0] for span in spans) < min(span[1] for span in spans)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        parameters = as_plain_data(self.method)
        data: dict[str, Any] = {"method": self.method.name, "parameters": parameters}
        for name in ("sites", "heads", "steps"):
            if getattr(self, name):
                data[name] = list(getattr(self, name))
        return data

    @classmethod
    def from_dict(cls, data: Any, problems: list[str]) -> Rule | None:
        """Validate plain data; None where that is wrong, with every reason added to `problems`."""
        if not isinstance(data, Mapping):
            problems.append(f"expected a mapping, got {data!r}.")
            return None
        name = data.get("method")
        config = METHODS.get(name) if isinstance(name, str) else None
        if config is None:
            problems.append(f"method {name!r} does not exist. {suggest(str(name), METHODS)}")
        settings = {f.name for f in dataclasses.fields(config)} if config is not None else set()
        before = len(problems)
        problems += [
            f"{key!r} is a parameter of {name}: write it below `parameters:`."
            if key in settings
            else unknown_key(key, RULE_KEYS, "key")
            for key in data
            if key not in RULE_KEYS
        ]
        parameters = data.get("parameters") or {}
        method = None
        if config is not None and not isinstance(parameters, Mapping):
            problems.append(f"parameters: expected a mapping, got {parameters!r}.")
        elif config is not None:
            method, found = make_method(config, parameters)
            problems += found
        rest = {
            "sites": names_in(data, "sites", problems),
            "heads": _heads(data.get("heads"), problems),
            "steps": _steps(data.get("steps"), problems),
        }
        if method is None or len(problems) > before:
            return None
        return cls(method=method, **rest)  # type: ignore[arg-type]


def names_in(data: Mapping[str, Any], key: str, problems: list[str]) -> tuple[str, ...]:
    """A list of names in plain data, or one name; a reason is added to `problems` if it is not."""
    value = data.get(key) or []
    value = [value] if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    problems.append(f"{key}: expected a list of names, got {value!r}.")
    return ()


def _heads(value: Any, problems: list[str]) -> tuple[int, ...]:
    """Numbers of heads."""
    if value is None:
        return ()
    listed = value if isinstance(value, (list, tuple)) else [value]
    if not listed or not all(type(item) is int and item >= 0 for item in listed):
        problems.append(f"heads: expected numbers of heads from 0, as in [0, 1], got {value!r}.")
    elif len(set(listed)) < len(listed):
        problems.append(f"heads: expected each head once, got {value!r}.")
    return tuple(listed)


def _steps(value: Any, problems: list[str]) -> tuple[float, float] | None:
    """A span of the steps, in fractions."""
    if value is None:
        return None
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    numbers = is_pair and all(type(item) in (int, float) for item in value)
    if not numbers or not 0 <= value[0] < value[1] <= 1:
        problems.append(
            "steps: expected two fractions of the denoising steps, first and last, as in "
            f"[0.2, 1.0], got {value!r}."
        )
        return None
    return float(value[0]), float(value[1])
