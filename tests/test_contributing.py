"""CONTRIBUTING.md works for someone who has nothing else: its examples are followed in a copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
COPIED = ("retrofit", "kernels", "recipes", "tests")
BLOCK = re.compile(r"^`([\w./-]+)`(?:, (above|in) `(\w+)`)?\n\n```\w+\n(.*?)^```$", re.M | re.S)


def _section(title: str) -> str:
    (body,) = re.findall(rf"^## {title}.*?\n(.*?)(?=^## )", PAGE, re.M | re.S)
    return body


def _follow(section: str, checkout: Path) -> list[str]:
    """Write the files of a section and insert its rows; returns the files written or changed."""
    touched = []
    for path, where, name, code in BLOCK.findall(section):
        file = checkout / path
        touched.append(path)
        if not where:
            assert not file.exists(), f"{path} exists already: choose another example"
            file.write_text(code)
            continue
        text = file.read_text()
        (start,) = (m.start() for m in re.finditer(rf"^{name}: .*\{{$", text, re.M))
        end = text.index("\n}\n", start) + 1
        place = start if where == "above" else end
        code = f"{code}\n\n" if where == "above" else code
        file.write_text(text[:place] + code + text[place:])
    return touched


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, where the examples can be added."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("cli.py", "pyproject.toml", "constraints.txt", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _run(checkout: Path, *command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def _shell_lines(section: str, start: str) -> list[list[str]]:
    """The commands of a section's `sh` blocks that begin with some words."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.split()[1:] for line in lines if line.startswith(start) and "MODEL" not in line]


def _check_style(checkout: Path, files: list[str]) -> None:
    python = [name for name in files if name.endswith(".py")]
    _run(checkout, "-m", "ruff", "check", "--ignore", "E402,I001", *python)
    _run(checkout, "-m", "ruff", "format", "--check", *[n for n in python if "tests/" not in n])


@pytest.mark.parametrize(
    ("title", "name", "files", "least"),
    [
        (
            "Add a method",
            "criss-cross",
            ["retrofit/methods/criss_cross.py", "recipes/vit_criss-cross.yaml"],
            40,
        ),
        ("Add a family", "spectrogram", ["retrofit/families/spectrogram.py"], 5),
    ],
)
def test_example_followed_word_for_word_passes_the_shared_tests(
    checkout: Path, title: str, name: str, files: list[str], least: int
) -> None:
    section = _section(title)
    touched = _follow(section, checkout)
    assert [path for path in touched if not path.startswith("tests/")] == files
    _check_style(checkout, touched)
    (tests,) = _shell_lines(section, "python -m pytest")
    out = _run(checkout, *tests, "-q", "-p", "no:cacheprovider")
    (passed,) = re.findall(r"(\d+) passed", out)
    assert int(passed) >= least
    for command in _shell_lines(section, "python cli.py"):
        assert name in _run(checkout, *command)


def test_every_place_that_the_page_names_exists() -> None:
    example = {path for path, *_ in BLOCK.findall(PAGE)}
    named = re.findall(r"`((?:retrofit|tests|kernels|recipes)/[\w./-]+)`", PAGE)
    missing = [path for path in named if path not in example and not (ROOT / path).exists()]
    assert not missing
    assert len(named) > 5
