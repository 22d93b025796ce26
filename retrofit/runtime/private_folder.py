"""A folder that nobody else can change: the user's own, and used by descriptor once it is open."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

OWN = 0o700
FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe must not block


class NotPrivateError(OSError):
    """A folder or file that somebody else may have put there; the message names it."""


@dataclass(frozen=True, kw_only=True)
class PrivateFolder:
    """An open folder. Names in it are looked up from its descriptor, wherever its path leads now.

    Attributes:
        path: Where it was when it was opened.
        descriptor: Of the folder itself.
    """

    path: Path
    descriptor: int

    @property
    def place(self) -> str:
        """A path for other programs: through the descriptor where the system offers that."""
        through = f"/proc/self/fd/{self.descriptor}"
        is_linux = sys.platform.startswith("linux")
        return through if is_linux and os.path.exists(through) else str(self.path)

    def open_file(self, name: str) -> int:
        """Open a regular file of the user's own for reading; returns its descriptor.

        Raises:
            OSError: If there is none, or it is a link, something else than a file, or not the
                user's.
        """
        opened = os.open(name, os.O_RDONLY | FILE, dir_fd=self.descriptor)
        found = os.fstat(opened)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():
            return opened
        os.close(opened)
        raise NotPrivateError(f"{self.path / name} is not a file of your own")

    def replace(self, name: str, data: bytes) -> None:
        """Write a file beside its place and give it its name in one step."""
        beside = f"{name}.{os.getpid()}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE
        self.remove(beside)  # of a process of that number that was killed
        try:
            with open(os.open(beside, flags, OWN, dir_fd=self.descriptor), "wb") as stream:
                stream.write(data)
            os.replace(beside, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            self.remove(beside)
            raise

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep other processes out of a block that names the same lock."""
        import fcntl

        flags = os.O_RDWR | os.O_CREAT | FILE
        with open(os.open(name, flags, 0o600, dir_fd=self.descriptor), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def private_folder(path: Path) -> Iterator[PrivateFolder]:
    """Open a folder that only the user can change; what is missing of it is made.

    Every part of its path is opened from the one before, and none may be a symbolic link, except
    where root made it: systems have a `/home` elsewhere.

    Args:
        path: An absolute path.

    Raises:
        OSError: If it can't be made, or something on the way is a link.
        NotPrivateError: If it is not the user's own, or others may write to it.
    """
    descriptor = _open_from_root(Path(os.path.abspath(path)))
    try:
        _check_own(path, descriptor)
        yield PrivateFolder(path=path, descriptor=descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder() -> Iterator[PrivateFolder]:
    """A new folder with a random name among the temporary files, deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="retrofit-") as name:
        descriptor = os.open(name, os.O_RDONLY | FOLDER)
        try:
            _check_own(Path(name), descriptor)
            yield PrivateFolder(path=Path(name), descriptor=descriptor)
        finally:
            os.close(descriptor)


def _check_own(path: Path, descriptor: int) -> None:
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid():
        raise NotPrivateError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivateError(
            f"{path} can be written by others, and may hold what they put there. Delete it"
        )
    if stat.S_IMODE(found.st_mode) != OWN:
        os.fchmod(descriptor, OWN)


def _open_from_root(path: Path) -> int:
    """Open a folder part by part."""
    here = os.open(path.anchor, os.O_RDONLY | FOLDER)
    above = Path(path.anchor)
    for part in _without_system_links(path).parts[1:]:
        above /= part
        try:
            with suppress(FileExistsError):
                os.mkdir(part, OWN, dir_fd=here)
            below = os.open(part, os.O_RDONLY | FOLDER, dir_fd=here)
        except OSError as error:
            raise _explained(error, above) from error
        finally:
            os.close(here)
        here = below
    return here


def _explained(error: OSError, path: Path) -> OSError:
    if path.is_symlink():
        return NotPrivateError(
            f"{path} is a symbolic link. Set XDG_CACHE_HOME to the folder where it leads"
        )
    return OSError(f"{path} can't be made or opened: {error.strerror}")


def _without_system_links(path: Path) -> Path:
    """Replace links that root made and the user can't change by where they lead."""
    done = Path(path.anchor)
    for part in path.parts[1:]:
        done /= part
        if done.is_symlink() and done.lstat().st_uid == 0 != os.getuid():
            done = done.resolve()
    return done
