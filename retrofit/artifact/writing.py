"""Write a folder so that it is there whole or not at all.

Files go into a hidden sibling of the target, are flushed to the disk, and the folder gets its name
by one rename at the end. A process that is killed leaves only the sibling, which no command takes
for a checkpoint and the next write to the same target removes.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from retrofit.checkpoints import PARTIAL
from retrofit.checkpoints.fingerprint import CHUNK, FileRecord, hash_file, sample_file
from retrofit.checkpoints.manifest import MANIFEST
from retrofit.runtime.errors import InputError, RetrofitError
from retrofit.runtime.interrupts import raise_if_interrupted, shielded
from retrofit.runtime.outputs import refuse_place

Advance = Callable[[int], object]
REPLACED = ".retrofit-replaced-"
NOT_THE_CHECKPOINT = {".git", ".cache", "__pycache__"}


def refuse_output(
    out: Path,
    source: Path,
    *,
    force: bool,
    names: set[str],
    check_earlier: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Check, before anything is done, that a folder may be written.

    Args:
        out: The folder.
        source: The checkpoint that is read.
        force: Whether an earlier result may be replaced.
        names: Paths that will be in it. Nothing else is ever deleted.
        check_earlier: Raises a `RetrofitError` unless what is there is an earlier result.

    Raises:
        InputError: If it exists, lies inside the source or around it, or can't be written there.
    """
    target, origin = out.resolve(), source.resolve()
    if target == origin:
        raise InputError(f"{out}: is the checkpoint itself, which is never changed. Give another.")
    if origin in target.parents:
        raise InputError(f"{out}: lies inside the checkpoint itself. Give a folder outside it.")
    if target in origin.parents:
        raise InputError(f"{out}: contains the checkpoint itself. Give another folder.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: exists and is no folder. Give another name.")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise InputError(f"{out}: exists. Give another folder, or replace it with --force.")
        _refuse_foreign(out, names, check_earlier)
    refuse_place(str(out), target)


def _refuse_foreign(out: Path, names: set[str], check_earlier: Callable[[Path], object]) -> None:
    """Refuse to replace what is not an earlier result."""
    present = (p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir())
    foreign = sorted(path for path in present if path not in names | {MANIFEST})
    if foreign:
        raise InputError(
            f"{out}: --force replaces only an earlier result, but it holds {foreign[0]}. "
            "Give another folder."
        )
    try:
        check_earlier(out)
    except RetrofitError as error:
        raise InputError(
            f"{out}: --force replaces only an earlier result, and this is none ({error}) "
            "Give another folder, or delete it yourself."
        ) from error


def refuse_full_disk(out: Path, needed: int) -> None:
    """Check that there is room.

    Raises:
        RetrofitError: If there is not.
    """
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RetrofitError(
            f"{out}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left. Free some "
            "space, give another folder, or use --link where the source is on the same disk."
        )


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden folder that becomes `out` when the block ends well, and else disappears.

    Args:
        out: The folder to make.
        replace: Whether what is there by then, and was checked, is replaced.

    Raises:
        InputError: If something is there by then that may not be replaced.
    """
    out = out.absolute()
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    hidden = out.parent / f".{out.name}{PARTIAL}{os.getpid()}"
    hidden.mkdir()
    try:
        yield hidden
        for folder, _, _ in os.walk(hidden):
            _flush_folder(Path(folder))
        raise_if_interrupted()
        _take_name(hidden, out, replace=replace)
        _flush_folder(out.parent)
    except BaseException:
        with shielded():
            shutil.rmtree(hidden, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()
        raise


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run left beside a target; put an earlier result back if it was moved."""
    name = glob.escape(out.name)
    for left in sorted(out.parent.glob(f".{name}{REPLACED}*")):
        if not out.exists():
            left.rename(out)
        elif not _is_running(left.name):
            shutil.rmtree(left)
    for left in sorted(out.parent.glob(f".{name}{PARTIAL}*")):
        if not _is_running(left.name):
            shutil.rmtree(left)


def list_files(root: Path) -> dict[str, Path]:
    """Every file of a checkpoint by its path, links followed; version control and caches aside."""
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        folders[:] = sorted(f for f in folders if f not in NOT_THE_CHECKPOINT)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            path = Path(folder) / name
            found[path.relative_to(root).as_posix()] = path
    return found


def total_size(files: Mapping[str, Path]) -> int:
    """Bytes of all of them."""
    return sum(path.stat().st_size for path in files.values())


def copy_files(
    files: Mapping[str, Path], target: Path, *, link: bool, advance: Advance
) -> dict[str, FileRecord]:
    """Copy or link files into a folder, flush them to the disk and fingerprint them.

    Raises:
        InputError: If they can't be linked because the target is on another disk.
    """
    return {
        path: copy_file(source, target / path, link=link, advance=advance)
        for path, source in files.items()
    }


def copy_file(source: Path, target: Path, *, link: bool, advance: Advance) -> FileRecord:
    """Copy or link one file; see `copy_files`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise InputError(
                f"{target.name}: can't be linked ({error.strerror}). Leave out --link, or write to "
                "the disk that holds the source."
            ) from error
        sha256 = hash_file(source, advance)
    else:
        sha256 = _copy_and_hash(source, target, advance)
    return FileRecord(size=target.stat().st_size, sha256=sha256, sample=sample_file(target))


def _copy_and_hash(source: Path, target: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(CHUNK):
            digest.update(chunk)
            write(writing.fileno(), chunk, target)
            advance(len(chunk))
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


def _flush_folder(folder: Path) -> None:
    if sys.platform != "win32":  # a folder can't be opened there
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_name(hidden: Path, out: Path, *, replace: bool) -> None:
    """Give the finished folder its name; an earlier result is exchanged in one step.

    Raises:
        InputError: If something took the name meanwhile that may not be replaced.
    """
    if not replace or not out.exists():
        try:
            with suppress(FileNotFoundError):
                out.rmdir()  # an empty folder is nobody's loss
            hidden.rename(out)
        except OSError as error:
            if not os.path.lexists(out):
                raise
            raise InputError(
                f"{out}: something was written there meanwhile, which is kept. Give another folder."
            ) from error
        return
    if _exchange(hidden, out):
        shutil.rmtree(hidden)
        return
    aside = out.parent / f".{out.name}{REPLACED}{os.getpid()}"
    out.rename(aside)
    hidden.rename(out)
    shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically, where the system can."""
    if not sys.platform.startswith("linux"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    with suppress(AttributeError):  # a C library without it
        return libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0
    return False


def _is_running(name: str) -> bool:
    """Whether the process whose number ends a leftover's name still runs."""
    import psutil

    number = name.rsplit("-", 1)[-1]
    return number.isdigit() and int(number) != os.getpid() and psutil.pid_exists(int(number))
