"""Copy or link the files of a checkpoint, and notice if they change meanwhile."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from retrofit.checkpoints.fingerprint import CHUNK, FileRecord, hash_file, sample_file
from retrofit.runtime.errors import InputError, RetrofitError
from retrofit.runtime.reading import open_regular

Advance = Callable[[int], object]
OWN = 0o700


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What a file was when something was worked out from it.

    Attributes:
        size: Bytes.
        sample: Of `sample_file`, which is all of a file of 1 MB.
        written: When it was written to, in nanoseconds.
    """

    size: int
    sample: str
    written: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Look at a file, which takes milliseconds."""
        found = file.stat()
        return cls(size=found.st_size, sample=sample_file(file), written=found.st_mtime_ns)


def total_size(files: Mapping[str, Path]) -> int:
    """Bytes of all of them."""
    return sum(path.stat().st_size for path in files.values())


def copy_files(
    files: Mapping[str, Path],
    target: Path,
    *,
    link: bool,
    advance: Advance,
    states: Mapping[str, FileState] | None = None,
) -> dict[str, FileRecord]:
    """Copy or link files with their modes into a folder, flush and fingerprint them.

    Args:
        files: By their path in the folder.
        target: The folder.
        link: Hard-link instead of copying.
        advance: Told of every number of bytes read.
        states: What they were when the copy was decided on.

    Raises:
        InputError: If they can't be linked because the target is on another disk.
        RetrofitError: If a file is not what it was.
    """
    copied = {}
    for path, source in files.items():
        _make_folders(source, target / path, target)
        record = copy_file(source, target / path, link=link, advance=advance)
        if states is not None and FileState.of(source) != states[path]:
            raise _changed(source)
        if states is not None and record.sample != states[path].sample:
            raise _changed(source)
        copied[path] = record
    return copied


def _changed(source: Path) -> RetrofitError:
    return RetrofitError(
        f"{source}: changed while it was being patched, so the proof is of other files than those "
        "that would be written. Run the command again once nothing writes to them."
    )


def _make_folders(source: Path, target: Path, root: Path) -> None:
    """Make the folders above a file, none more open than the one that its source is in."""
    missing = []
    while target.parent != root and not target.parent.exists():
        source, target = source.parent, target.parent
        missing.append((source, target))
    for source, target in reversed(missing):
        target.mkdir(mode=OWN)
        target.chmod(folder_mode(source))


def folder_mode(folder: Path) -> int:
    """The mode of a folder, as far as a copy of it takes it over."""
    return stat.S_IMODE(folder.stat().st_mode) & 0o777 | OWN


def keep_private(folder: Path, file: Path) -> None:
    """Take from a file what no other file of a folder lets others do."""
    modes = [path.stat().st_mode for path in folder.rglob("*") if path.is_file() and path != file]
    allowed = functools.reduce(operator.and_, modes, 0o777)
    file.chmod(stat.S_IMODE(file.stat().st_mode) & allowed | 0o600)


def copy_file(source: Path, target: Path, *, link: bool, advance: Advance) -> FileRecord:
    """Copy or link one file; see `copy_files`."""
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise InputError(
                f"{target.name}: can't be linked ({error.strerror}). Leave out --link, or write to "
                "the disk that holds the source."
            ) from error
        sha256 = hash_file(target, advance)
    else:
        sha256 = _copy_and_hash(source, target, advance)
    return FileRecord(size=target.stat().st_size, sha256=sha256, sample=sample_file(target))


def _copy_and_hash(source: Path, target: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with open_regular(source) as reading, open(os.open(target, flags, 0o600), "wb") as writing:
        while chunk := reading.read(CHUNK):
            digest.update(chunk)
            write(writing.fileno(), chunk, target)
            advance(len(chunk))
        mode = stat.S_IMODE(os.fstat(reading.fileno()).st_mode) & 0o777
        os.chmod(target, mode)
        os.fsync(writing.fileno())
    return digest.hexdigest()


def write(descriptor: int, chunk: bytes, target: Path) -> None:
    """Write all of a chunk; an error names the file."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
