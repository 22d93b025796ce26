"""What is written: whether it can be, and the folders above it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from retrofit.runtime.errors import InputError

PARTIAL = ".retrofit-partial-"  # in the names of what is not finished
FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system says of a full disk


def refuse_file(option: str, file: Path) -> None:
    """Find out before anything runs that a file can't be written; missing folders are no reason.

    Args:
        option: What named it, for the message.
        file: The file.

    Raises:
        InputError: If it is a folder, or the nearest folder above it is none or is read-only.
    """
    refuse_place(f"{option} {file}", file)
    if file.is_dir():
        raise InputError(f"{option} {file}: is a folder. Give another name.")


def refuse_place(what: str, path: Path) -> None:
    """Find out whether something new can be made where a path is, by making something.

    Args:
        what: How messages name the path.
        path: A file or folder; folders above it may be missing.

    Raises:
        InputError: If the nearest folder above it is none, or takes nothing new, or its name is
            that of something unfinished.
        OSError: If the disk is full.
    """
    if any(PARTIAL in part for part in path.absolute().parts):
        raise InputError(
            f"{what}: names with {PARTIAL} are those of unfinished results, which no command "
            "reads. Give another name."
        )
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError(f"{what}: {parent} is a file. Give a name in another place.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{what}: {parent} is read-only. Give a folder that you may write to.")
    try:
        Path(tempfile.mkdtemp(prefix=".retrofit-", dir=parent)).rmdir()
    except OSError as error:  # whoever asks: /proc takes nothing from root either
        if error.errno in FULL:
            raise
        raise InputError(
            f"{what}: {parent} is a folder that can't be written to. Give another folder."
        ) from error


def make_folders(file: str | Path) -> None:
    """Make the folders above a file that is about to be written."""
    Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
