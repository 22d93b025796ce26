"""What is installed is what the folders hold; what is type-checked is what is imported."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = ("retrofit", "kernels", "recipes")
NOT_SHIPPED = ("__pycache__", "*.egg-info")


def _mapped_folder(package: str) -> Path:
    places = PROJECT["tool"]["setuptools"]["package-dir"]
    return ROOT / places.get(package, package.replace(".", "/"))


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names inside a wheel built from a copy, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in (*SHIPPED, "tests", "examples"):
        ignored = shutil.ignore_patterns(*NOT_SHIPPED, "*.safetensors")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(source / "out"), str(source)], check=True)
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_package_map_lists_exactly_the_folders_that_hold_modules() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    inside = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "retrofit").rglob("__init__.py")
    }
    operators = {f"retrofit.kernels.{i.parent.name}" for i in ROOT.glob("kernels/*/__init__.py")}
    assert listed == inside | operators | {"retrofit.recipes"}
    assert all((_mapped_folder(package) / "__init__.py").is_file() for package in listed)


def test_kernels_folder_is_no_package_so_that_it_shadows_no_other() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_installs_nothing_but_retrofit(wheel_files: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"retrofit"}


def test_wheel_holds_every_module_recipe_and_kernel_source(wheel_files: list[str]) -> None:
    expected = {"retrofit/py.typed"}
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        files = [f for f in _mapped_folder(package).iterdir() if f.is_file()]
        kinds = (".py", ".yaml", ".c", ".h", ".json")
        expected |= {f"{package.replace('.', '/')}/{f.name}" for f in files if f.suffix in kinds}
    assert expected <= set(wheel_files)
    assert any(name.endswith("block_sparse/reference.py") for name in expected)


def test_wheel_offers_the_command(wheel_files: list[str]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel_files)
    assert PROJECT["project"]["scripts"] == {"retrofit": "retrofit.commands:main"}


def test_importing_transformers_still_finds_its_own_kernels_package() -> None:
    code = "import transformers; transformers.LlamaForCausalLM; import retrofit.kernels"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_command_line_runs_from_a_checkout() -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "retrofit" in done.stdout


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("window_attention()", 'Missing positional arguments "query", "key", "value"'),
        ("merge_attention(1)", "has incompatible type"),
        ("select_blocks()", "Missing positional argument"),
    ],
)
def test_type_checker_sees_the_signatures_of_operators(call: str, complaint: str) -> None:
    name = call.split("(")[0]
    code = f"from retrofit.kernels import {name}\n{call}\n"
    command = [sys.executable, ".ci/types.py", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert complaint in done.stdout


def test_constraints_pin_everything_that_the_documented_command_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(line.split("==")[0])
        for line in lines
        if re.fullmatch(r"[\w.-]+==\S+", line)
    }
    assert _needed("retrofit-attention", ("dev",)) - pinned == {"retrofit-attention"}


def _needed(distribution: str, extras: tuple[str, ...]) -> set[str]:
    """Names of a distribution and of all it needs, as installed here."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    queue = [(distribution, extras)]
    while queue:
        name, wanted = queue.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            environments = [{"extra": extra} for extra in (*wanted, "")]
            if marker is None or any(marker.evaluate(e) for e in environments):
                queue.append((requirement.name, tuple(requirement.extras)))
    return {canonicalize_name(name) for name, _ in seen}


def test_pre_commit_uses_the_versions_that_make_test_uses() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    (version,) = set(re.findall(r"ruff==([\d.]+)", hooks))
    assert f"ruff=={version}\n" in constraints


def test_make_lists_its_targets_without_an_environment() -> None:
    command = ["make", "help", "VENV=nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"make demo", "make test"} <= {line[:9].strip() for line in done.stdout.splitlines()}
    assert not (ROOT / "nowhere").exists()


def test_make_refuses_an_old_python_with_the_fix(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "setup", f"VENV={tmp_path}/venv", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected Python 3.11 or newer, got Python 3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists()
