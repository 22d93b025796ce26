"""Check types and imports of the package as installed: its package map linked into one tree."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".build" / "types"


def link_package_map() -> None:
    """Rebuild the tree in which every mapped package stands where it is imported from."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shutil.rmtree(TREE, ignore_errors=True)
    for package in sorted(setuptools["packages"]):
        source = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        target = TREE / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted([*source.glob("*.py"), *source.glob("py.typed")]):
            (target / file.name).symlink_to(file)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keep runs that start together from rebuilding the tree under each other."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    TREE.parent.mkdir(exist_ok=True)
    with (TREE.parent / "types.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Run mypy on the tree, with any further arguments."""
    with one_at_a_time():
        return check()


def check() -> int:
    """Rebuild the tree, run mypy on it, and hold its imports against the contracts."""
    link_package_map()
    return check_types() or (0 if sys.argv[1:] else check_imports())


def check_imports() -> int:
    """Run import-linter with the contracts of pyproject.toml."""
    command = [str(Path(sys.executable).parent / "lint-imports"), str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    done = subprocess.run(
        [*command, "--no-logo", "--cache-dir", str(ROOT / ".build" / "imports")],
        cwd=TREE, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    print(
        done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stdout + done.stderr
    )
    return done.returncode


def check_types() -> int:
    """Run mypy."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache")]
    arguments = sys.argv[1:] or ["-p", "retrofit"]
    environment = {**os.environ, "MYPYPATH": str(TREE)}
    config = ["--config-file", str(ROOT / "pyproject.toml")]
    return subprocess.run([*command, *config, *arguments], cwd=TREE, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
