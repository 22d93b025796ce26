"""The command line from a patched checkpoint to the original's own bytes."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from retrofit.runtime.errors import RetrofitError

PATCHED = "minilm-block-sparse"
RESTORED = "minilm-again"


def run_round_trip(model: Path, folder: Path) -> list[str]:
    """Patch, verify and unpatch with the commands that a user types, and compare the bytes.

    Args:
        model: The checkpoint.
        folder: Where the patched and the restored one go; what an earlier run left there goes.

    Returns:
        Names of the files that were compared.

    Raises:
        RetrofitError: If a command fails or a file differs.
    """
    patched, restored = folder / PATCHED, folder / RESTORED
    for earlier in (patched, restored):
        shutil.rmtree(earlier, ignore_errors=True)
    method = ["--method", "block-sparse", "--set", "keep=0.5"]
    _retrofit("patch", str(model), *method, "-o", str(patched))
    _retrofit("verify", str(patched))
    _retrofit("unpatch", str(patched), "-o", str(restored))
    return compare_bytes(model, restored)


def compare_bytes(original: Path, restored: Path) -> list[str]:
    """Compare the SHA-256 of every file of two folders.

    Raises:
        RetrofitError: If a file is missing, new or different.
    """
    expected, found = _digests(original), _digests(restored)
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        raise RetrofitError(
            f"{restored}: expected the bytes of {original}, got others in {', '.join(wrong)}. "
            "Please report this."
        )
    return sorted(expected)


def _digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _retrofit(*arguments: str) -> None:
    print(f"\n$ retrofit {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-c", "from retrofit.commands import main; main()", *arguments]
    done = subprocess.run(command)
    if done.returncode:
        raise RetrofitError(
            f"demo: `retrofit {arguments[0]}` ended with {done.returncode}; its message is above."
        )
