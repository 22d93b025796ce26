"""Recipes: rules of methods, with the family and the networks they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from torch import Tensor

from retrofit.checkpoints.record_types import OuterRecipe
from retrofit.methods import METHODS, Method
from retrofit.patching.rule import RULE_KEYS, Rule, names_in
from retrofit.runtime.errors import ConfigError, NotFoundError, suggest, unknown_key
from retrofit.runtime.reading import YAML_BYTES, parse_yaml, read_text
from retrofit.runtime.schema import OTHER_KEYS, find_problems

COMMON = ("family", "components", "description", "finetune")
SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
CHECKOUT = Path(__file__).resolve().parents[2] / "recipes"


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
        finetune: Settings that `retrofit finetune` begins with, such as the learning rate; no part
            of what is installed.
        name: What messages call it; no part of the recipe.
    """

    rules: tuple[Rule, ...]
    family: str | None = None
    components: tuple[str, ...] = ()
    description: str = ""
    learned: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    finetune: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
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
        components = names_in(data, "components", problems)
        if not isinstance(data.get("finetune") or {}, Mapping):
            problems.append(f"finetune: expected settings by name, got {data['finetune']!r}.")
        found = tuple(rule for rule in rules if rule is not None)
        if problems or not found:
            raise ConfigError(f"{where}: " + " ".join(problems))
        return cls(
            rules=found,
            family=data.get("family"),
            components=components,
            description=str(data.get("description", "")),
            finetune=data.get("finetune") or {},
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
