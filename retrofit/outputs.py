"""One file that is written: whether it can be, and the folders above it."""

from __future__ import annotations

import os
from pathlib import Path

from retrofit.errors import InputError


def refuse_file(option: str, file: Path) -> None:
    """Find out before anything runs that a file can't be written; missing folders are no reason.

    Args:
        option: What named it, for the message.
        file: The file.

    Raises:
        InputError: If it is a folder, or the nearest folder above it is none or is read-only.
    """
    parent = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError(f"{option} {file}: {parent} is a file. Give a name in another place.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {file}: {parent} is read-only. Give another folder.")
    if file.is_dir():
        raise InputError(f"{option} {file}: is a folder. Give another name.")


def make_folders(file: str | Path) -> None:
    """Make the folders above a file that is about to be written."""
    Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
