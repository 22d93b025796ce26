"""README.md says only what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer.main

import retrofit
from retrofit.commands import VERBS, app
from retrofit.families import FAMILIES
from retrofit.methods import METHODS
from retrofit.patching.networks import find_networks
from retrofit.profiling.inspection import _why_not
from tests.architectures.small_networks import small_pi3, small_vggt
from tests.tiny_models import FAMILY_MODELS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _rows(heading: str) -> dict[str, str]:
    """First cells of a table by the names in them, with the rest of their row."""
    (body,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.M)
    rows = {}
    for line in body.splitlines():
        first, rest = line.strip("|").split("|", 1)
        rows |= dict.fromkeys(re.findall(r"`([\w-]+)`", first), rest)
    return rows


def test_every_command_shown_exists_with_its_options() -> None:
    lines = re.findall(r"^retrofit (\w+)(.*)$", README, re.M)
    assert {verb for verb, _ in lines} >= {"patch", "verify", "compare", "unpatch", "doctor"}
    for verb, rest in lines:
        names = {name for option in COMMANDS[verb].params for name in option.opts}
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", rest)) <= names, verb


def test_methods_and_families_shown_are_those_that_there_are() -> None:
    assert _rows("method").keys() == METHODS.keys()
    assert _rows("family").keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_shown_for_a_family_are_those_that_apply(family: str) -> None:
    shown = set(
        re.findall("|".join(sorted(METHODS, key=len, reverse=True)), _rows("family")[family])
    )
    networks = [row.make_model() for row in FAMILY_MODELS.values() if row.family == family]
    networks += {"vggt": [small_vggt()], "pi3": [small_pi3()]}.get(family, [])
    found = [one for network in networks for one in find_networks(network)]
    descriptions = [one.family.describe(one.module) for one in found]
    assert {one.family.name for one in found} == {family}
    applying = {
        name
        for name, method in METHODS.items()
        if any(_why_not(method(), description) is None for description in descriptions)
    }
    assert shown == applying


def test_python_shown_uses_public_names() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    used = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "retrofit"
    }
    assert used == {"patch", "save", "load"}
    assert used <= set(retrofit.__all__)


def test_links_into_the_project_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_every_verb_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert all(f"`{name}`" in changelog for name in (*VERBS, *METHODS, *FAMILIES))
