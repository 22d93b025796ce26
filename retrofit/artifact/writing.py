"""Write a folder so that it is there whole or not at all.

Files go into a hidden sibling of the target, are flushed to the disk, and the folder gets its name
by one rename at the end. A process that is killed leaves only the sibling, which no command takes
for a checkpoint and the next write to the same target removes.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from retrofit.checkpoints.manifest import MANIFEST
from retrofit.checkpoints.places import scan
from retrofit.runtime.errors import InputError, RetrofitError
from retrofit.runtime.interrupts import raise_if_interrupted, shielded
from retrofit.runtime.outputs import PARTIAL, refuse_place

REPLACED = ".retrofit-replaced-"
TRIES = 20  # of making a folder whose parents another process removes


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
    foreign = sorted(_find_foreign(out, names | {MANIFEST}))
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


def _find_foreign(out: Path, names: set[str]) -> Iterator[str]:
    """What retrofit did not write: other names, links, and folders that hold nothing."""
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    waiting = [out]
    while waiting:
        folder = waiting.pop()
        entries = scan(folder)
        if not entries and folder.relative_to(out).as_posix() not in folders:
            yield f"{folder.relative_to(out).as_posix()}/"
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_symlink() or path.relative_to(out).as_posix() not in names:
                yield path.relative_to(out).as_posix()


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
def new_folder(out: Path, *, replace: bool = False, mode: int | None = None) -> Iterator[Path]:
    """Yield a hidden folder that becomes `out` when the block ends well, and else disappears.

    Args:
        out: The folder to make.
        replace: Whether what is there by then, and was checked, is replaced.
        mode: Its permissions; nobody else can look into it before. None takes the usual ones.

    Raises:
        InputError: If something is there by then that may not be replaced.
    """
    out = out.absolute()
    missing = [folder for folder in out.parents if not folder.exists()]
    hidden = _make_hidden(out, 0o777 if mode is None else 0o700)
    try:
        with held(hidden):
            yield hidden
            for folder, _, _ in os.walk(hidden):
                _flush_folder(Path(folder))
            if mode is not None:
                hidden.chmod(mode)
            raise_if_interrupted()
            with held(out.parent):
                _take_name(hidden, out, replace=replace)
        _flush_folder(out.parent)
    except BaseException:
        with shielded():
            shutil.rmtree(hidden, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()
        raise


def _make_hidden(out: Path, mode: int) -> Path:
    """A folder beside `out`, after what killed runs left there was removed."""
    hidden = out.parent / f".{out.name}{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
    for left in reversed(range(TRIES)):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with held(out.parent):
                remove_leftovers(out)
                hidden.mkdir(mode=mode)
            break
        except FileNotFoundError:  # another run failed and took the parents with it
            if not left:
                raise
    return hidden


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs that ask for the same folder out, as long as this one lives."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run left beside a target; put an earlier result back if it was moved."""
    for left in _find_leftovers(out, REPLACED):
        if not out.exists():
            left.rename(out)
        elif not _is_running(left):
            shutil.rmtree(left)
    for left in _find_leftovers(out, PARTIAL):
        if not _is_running(left):
            shutil.rmtree(left)


def _find_leftovers(out: Path, kind: str) -> list[Path]:
    """Folders of the names that runs give, which end in the number of a process."""
    named = re.compile(re.escape(f".{out.name}{kind}") + r"\d+(-[0-9a-f]{8})?")
    return sorted(
        Path(entry.path)
        for entry in scan(out.parent)
        if named.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    )


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


def _is_running(left: Path) -> bool:
    """Whether the run that made a leftover still holds it, or another process of its number runs.

    The number alone says little: containers that share a disk count their own.
    """
    import psutil

    number = int(left.name.rpartition(".retrofit-")[2].split("-")[1])
    if number != os.getpid() and psutil.pid_exists(number):
        return True
    return _is_held(left)


def _is_held(folder: Path) -> bool:
    if os.name != "posix":
        return False
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a network disk without locks
        return False
    finally:
        os.close(descriptor)
    return False
