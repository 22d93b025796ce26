"""Where the files of a checkpoint may lie: names in records, and links between folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from retrofit.runtime.errors import CheckpointError, InputError
from retrofit.runtime.reading import require_regular

BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # named after its own sha1 or sha256
NOT_THE_CHECKPOINT = {".git", ".cache", "__pycache__"}
MOST_FILES = 100_000
MOST_LINKS = 500  # to folders, which can make endlessly many files of few


def is_plain_name(name: str) -> bool:
    """Whether a name is one part of a path, on any system."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\:\0")


def is_inside(path: str) -> bool:
    """Whether a relative path with slashes can't lead out of the folder it starts from."""
    parts = path.split("/")
    return all(is_plain_name(part) for part in parts)


def list_files(root: Path) -> dict[str, Path]:
    """Every file of a checkpoint by its path; version control and caches aside.

    Links are followed within the checkpoint and into a hub cache, whose snapshots are links.

    Raises:
        InputError: If a link leads elsewhere or nowhere, something is neither file nor folder, or
            a folder can't be read.
    """
    found: dict[str, Path] = {}
    links = 0
    for path, is_file in _walk(root, root, (root.resolve(),)):
        if is_file:
            found[path.relative_to(root).as_posix()] = path
        links += not is_file and path.is_symlink()
        if len(found) > MOST_FILES or links > MOST_LINKS:
            raise InputError(
                f"{root}: expected at most {MOST_FILES} files and {MOST_LINKS} links to folders, "
                "got more. Give the folder of the checkpoint alone."
            )
    return found


def _walk(folder: Path, root: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, bool]]:
    """What is in a folder, and whether it is a file; a folder that it lies in is left out."""
    for entry in scan(folder):
        path = Path(entry.path)
        if entry.is_symlink():
            _check_link(path, root)
        if not entry.is_dir():
            require_regular(path, path.stat())
            yield path, True
        elif entry.name not in NOT_THE_CHECKPOINT and (real := path.resolve()) not in above:
            yield path, False
            yield from _walk(path, root, (*above, real))


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name.

    Raises:
        InputError: If it can't be read.
    """
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError as error:
        raise InputError(
            f"{folder}: a folder that can't be read ({error.strerror}). Change its permissions, as "
            f"in chmod u+rx {folder}"
        ) from error


def _check_link(link: Path, root: Path) -> None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python says a loop of links so
        raise CheckpointError(f"{link}: a link that leads nowhere. Remove it.") from error
    if target.is_relative_to(root.resolve()) or is_hub_blob(target):
        return
    raise CheckpointError(
        f"{link}: a link that leads out of the checkpoint, to {target}. Put the file itself in its "
        f"place, if it belongs here, or remove the link."
    )


def is_hub_blob(path: Path) -> bool:
    """Whether a file is one that the hub's cache keeps under the hash of its bytes."""
    blobs = path.parent
    return (
        blobs.name == "blobs"
        and blobs.parent.name.startswith(("models--", "datasets--"))
        and BLOB.fullmatch(path.name) is not None
    )
