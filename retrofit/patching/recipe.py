"""Recipes: rules that say which method acts at which sites, heads and steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from torch import Tensor

from retrofit.checkpoints.record_types import OuterRecipe
from retrofit.methods import METHODS, Method
from retrofit.patching.settings import as_plain_data, make_method
from retrofit.runtime.errors import ConfigError, NotFoundError, suggest, unknown_key
from retrofit.runtime.reading import YAML_BYTES, parse_yaml, read_text
from retrofit.runtime.schema import OTHER_KEYS, find_problems

COMMON = ("family", "components", "description")
RULE_KEYS = ("method", "parameters", "sites", "heads", "steps")
SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
CHECKOUT = Path(__file__).resolve().parents[2] / "recipes"


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
            "sites": _names(data, "sites", problems),
            "heads": _heads(data.get("heads"), problems),
            "steps": _steps(data.get("steps"), problems),
        }
        if method is None or len(problems) > before:
            return None
        return cls(method=method, **rest)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to install, and where.

    Attributes:
        rules: Of which each may act at sites, heads or steps of its own; where two act at once it
            is an error.
        family: The family it was written for; None fits any that the methods accept.
        components: Networks of a pipeline to patch; empty means its denoising networks.
        description: What it is good for.
        learned: Learned parts as `Patch.state_dict` gives them, which the patch begins with; beside
            the recipe, not in it.
        name: What messages call it; no part of the recipe.
    """

    rules: tuple[Rule, ...]
    family: str | None = None
    components: tuple[str, ...] = ()
    description: str = ""
    learned: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    name: str = field(default="recipe", compare=False, repr=False)

    @classmethod
    def of(cls, method: Method, *, sites: Sequence[str] = (), family: str | None = None) -> Recipe:
        """A recipe of one rule."""
        return cls(rules=(Rule(method=method, sites=tuple(sites)),), family=family)

    @property
    def method(self) -> Method:
        """The method of its only rule.

        Raises:
            ConfigError: If it has several.
        """
        if len(self.rules) > 1:
            raise ConfigError(
                f"{self.name}: expected a recipe of one rule, got {len(self.rules)} "
                f"({self.methods}). Change the settings in its file."
            )
        return self.rules[0].method

    @property
    def methods(self) -> str:
        """Names of its methods, for people."""
        return " + ".join(dict.fromkeys(rule.method.name for rule in self.rules))

    @property
    def is_exact(self) -> bool:
        """Whether every method gives the dense model's output within rounding."""
        return all(rule.method.is_exact for rule in self.rules)

    @property
    def keep(self) -> float | None:
        """Fraction of the work that its only rule keeps, where that is a setting."""
        return getattr(self.rules[0].method, "keep", None) if len(self.rules) == 1 else None

    def acting_step(self, num_steps: int) -> int:
        """The first step at which the most rules act."""
        acting = [sum(r.acts_at(step, num_steps) for r in self.rules) for step in range(num_steps)]
        return acting.index(max(acting))

    def explain_no_change(self, where: str, what: str = "this recipe") -> str:
        """One line for people whose patch changed nothing; see `Patch.changes_nothing`."""
        if len(self.rules) == 1:
            return self.method.explain_no_change(where, what)
        reasons = [rule.method.explain_no_change(where, rule.method.name) for rule in self.rules]
        return f"{what} changes nothing at {where}. {' '.join(dict.fromkeys(reasons))}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data: what YAML and `retrofit.json` hold; one rule without `rules`."""
        rules = [rule.to_dict() for rule in self.rules]
        is_short = len(rules) == 1 and not self.needs_rules
        data: dict[str, Any] = rules[0] if is_short else {"rules": rules}
        if self.family is not None:
            data["family"] = self.family
        if self.components:
            data["components"] = list(self.components)
        if self.description:
            data["description"] = self.description
        return data

    @property
    def needs_rules(self) -> bool:
        """Whether an older retrofit, which knew one method at some sites only, can't read it."""
        return len(self.rules) > 1 or bool(self.rules[0].heads or self.rules[0].steps)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate plain data.

        Raises:
            ConfigError: With every mistake at once.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}.")
        problems: list[str] = []
        if "rules" in data:
            rules = _several(data, problems)
        else:
            short = {key: value for key, value in data.items() if key not in COMMON}
            rules = [Rule.from_dict(short, problems)]
        components = _names(data, "components", problems)
        found = tuple(rule for rule in rules if rule is not None)
        if problems or not found:
            raise ConfigError(f"{where}: " + " ".join(problems))
        return cls(
            rules=found,
            family=data.get("family"),
            components=components,
            description=str(data.get("description", "")),
            name=where,
        )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file.

        Raises:
            NotFoundError: If there is no such file.
            ConfigError: If it is not a valid recipe.
        """
        try:
            text = read_text(path, YAML_BYTES)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise NotFoundError(
                f"{path}: can't be read ({why}). Give a YAML file, or the name of a "
                f"shipped recipe. {suggest(Path(path).stem, shipped_recipes())}"
            ) from error
        try:
            data = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{path}: expected YAML: {error}.") from error
        problems = find_problems(data, Annotated[OuterRecipe, OTHER_KEYS])
        if problems:
            raise ConfigError(f"{path}: {'; '.join(problems)}.")
        return cls.from_dict(data, str(path))

    def to_yaml(self) -> str:
        """As YAML text that `read` takes."""
        return yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False)


def method_names(data: Mapping[str, Any]) -> str:
    """Names of the methods of a recipe's plain data, for people."""
    rules = data.get("rules") or [data]
    return " + ".join(dict.fromkeys(str(rule.get("method")) for rule in rules))


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name (`<family>_<method>`)."""
    folder = SHIPPED if SHIPPED.is_dir() else CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def default_recipe(method: str, family: str) -> Recipe:
    """The shipped recipe of a method for a family, else the method's defaults.

    Raises:
        NotFoundError: If there is no such method.
    """
    if method not in METHODS:
        raise NotFoundError(f"method {method!r} does not exist. {suggest(method, METHODS)}")
    path = shipped_recipes().get(f"{family}_{method}")
    return Recipe.read(path) if path is not None else Recipe.of(METHODS[method]())


def _several(data: Mapping[str, Any], problems: list[str]) -> list[Rule | None]:
    """The rules of a recipe's long form."""
    keys = ("rules", *COMMON)
    problems += [
        f"{key!r} stands beside `rules`: write it in a rule."
        if key in RULE_KEYS
        else unknown_key(key, keys, "key")
        for key in data
        if key not in keys
    ]
    listed = data["rules"]
    if not isinstance(listed, (list, tuple)) or not listed:
        problems.append(f"rules: expected a list of rules, got {listed!r}.")
        return []
    rules = []
    for i, item in enumerate(listed):
        wrong: list[str] = []
        rules.append(Rule.from_dict(item, wrong))
        problems += [f"rules[{i}]: {text}" for text in wrong]
    return rules


def _names(data: Mapping[str, Any], key: str, problems: list[str]) -> tuple[str, ...]:
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
