"""Compile a C kernel once into the user's cache and load it; say why where that can't be done."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from retrofit.runtime.private_folder import PrivateFolder, private_folder, temporary_folder

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
TIMEOUT = 120.0  # seconds that a compiler may take
BUILT = "built.so"
RECORD_BYTES = 128

Loaded = tuple[ctypes.CDLL | None, str]


def load_library(source: Path) -> Loaded:
    """The library compiled from a C file, or None and the reason why there is none.

    `RETROFIT_NATIVE=0` in the environment refuses, whatever was loaded before.
    """
    if os.environ.get("RETROFIT_NATIVE", "1").lower() in ("0", "off", "false", "no"):
        return None, "switched off by RETROFIT_NATIVE"
    return _load(source)


def cache_directory() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/retrofit`, or the platform's equivalent."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification has relative ones ignored
        return Path(given) / "retrofit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "retrofit"
    return Path.home() / ".cache" / "retrofit"


@lru_cache(maxsize=16)
def _load(source: Path) -> Loaded:
    """Look once per source: making paths would take a good part of a short call."""
    if os.name != "posix":
        return None, f"no native kernel for {platform.system()}"
    try:
        compiler = find_compiler()
    except ValueError as error:
        return None, f"CC={os.environ['CC']} can't be read ({error}). Set it to a command like gcc"
    if compiler is None:
        return None, f"no C compiler ({', '.join(COMPILERS)}, or $CC); install one, gcc for example"
    name = f"{source.parent.name}-{_fingerprint(source, compiler)}.so"
    cache = cache_directory()
    try:
        with private_folder(cache) as folder:
            return _find_or_build(folder, name, source, compiler), f"compiled into {cache}"
    except _BuildError as error:
        return None, str(error)
    except OSError as error:  # a home that can't be written to, or that allows no execution
        reason = _reason(error)
    try:
        with temporary_folder() as folder:
            library = _build(folder, name, source, compiler)
            return library, f"compiled for this process only: {reason}"
    except (_BuildError, OSError) as error:
        return None, "; ".join(dict.fromkeys((reason, _reason(error))))


class _BuildError(RuntimeError):
    """The compiler does not run, or refuses the source: another folder would not help."""


def _find_or_build(
    folder: PrivateFolder, name: str, source: Path, compiler: list[str]
) -> ctypes.CDLL:
    """Load what was built and recorded before, else build it, as one process at a time.

    Raises:
        OSError: If the folder can't be used, or holds what can't be loaded.
    """
    library = _load_recorded(folder, name)
    if library is not None:
        return library
    with folder.locked(f"{name}.lock"):
        return _load_recorded(folder, name) or _build(folder, name, source, compiler)


def _load_recorded(folder: PrivateFolder, name: str) -> ctypes.CDLL | None:
    """Load a library that is byte for byte what was built; None where there is no such file."""
    try:
        with open(folder.open_file(f"{name}.sha256"), "rb") as stream:
            recorded = stream.read(RECORD_BYTES)
        descriptor = folder.open_file(name)
    except OSError:
        return None
    try:
        with open(descriptor, "rb", closefd=False) as stream:
            if _record(stream.read()) != recorded:
                return None
        return _open_library(folder, name, descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _open_library(folder: PrivateFolder, name: str, descriptor: int) -> ctypes.CDLL:
    """Load the very file that a descriptor holds, where the system can.

    The loader takes two files of one name for the same library, so the descriptor that names it
    stays open as long as the process lives.
    """
    kept = os.dup(descriptor)
    through = f"/proc/self/fd/{kept}"
    try:
        is_linux = sys.platform.startswith("linux") and os.path.exists(through)
        return ctypes.CDLL(through if is_linux else str(folder.path / name))
    except BaseException:
        os.close(kept)
        raise


def _record(library: bytes) -> bytes:
    """What is written beside a library: its size and sha256."""
    return f"{len(library)} {hashlib.sha256(library).hexdigest()}\n".encode()


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return f"{error.filename or 'the cache'}: {error.strerror}"


def _build(folder: PrivateFolder, name: str, source: Path, compiler: list[str]) -> ctypes.CDLL:
    """Compile, record, load: a half-written library is never found.

    Raises:
        OSError: If it can't be written or loaded; nothing is left then.
        _BuildError: If it can't be compiled.
    """
    built = _compile(source, compiler)
    folder.remove(f"{name}.sha256")
    folder.replace(name, built)
    try:
        descriptor = folder.open_file(name)
        try:
            library = _open_library(folder, name, descriptor)
        finally:
            os.close(descriptor)
        folder.replace(f"{name}.sha256", _record(built))
    except OSError as error:
        folder.remove(name)
        raise OSError(f"{folder.path / name} can't be loaded: {error}") from error
    return library


def _compile(source: Path, compiler: list[str]) -> bytes:
    """The library, compiled in a folder that nobody else can look into.

    Raises:
        _BuildError: With the compiler's own words.
    """
    reason = ""
    with temporary_folder() as folder:
        for native in (_native_flags(), ()):
            output = f"{folder.place}/{BUILT}"
            command = [*compiler, *FLAGS, *native, str(source), "-o", output, "-lm"]
            inherited = (folder.descriptor,)  # which the output's path goes through
            try:
                done = subprocess.run(
                    command, pass_fds=inherited, capture_output=True, text=True, timeout=TIMEOUT
                )
                if done.returncode == 0:
                    with open(folder.open_file(BUILT), "rb") as stream:
                        return stream.read()
            except (OSError, subprocess.TimeoutExpired) as error:
                reason = f"{shlex.join(compiler)} did not run: {error}"
                continue
            lines = done.stderr.strip().splitlines() or ["no message"]
            first = next((line for line in lines if "error" in line), lines[0])
            reason = f"{shlex.join(compiler)} failed with status {done.returncode}: {first}"
    raise _BuildError(reason)


def find_compiler() -> list[str] | None:
    """The command of the C compiler: `$CC`, else the first of `COMPILERS` that is installed.

    Raises:
        ValueError: If `$CC` has a quote that is not closed.
    """
    given = shlex.split(os.environ.get("CC", ""))
    if given and shutil.which(given[0]):
        return given
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def _native_flags() -> tuple[str, ...]:
    """Ask for the instructions of this very processor."""
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    return ("-mcpu=native",) if is_arm else ("-march=native",)


def _fingerprint(source: Path, compiler: list[str]) -> str:
    """Of the source with its includes, the compiler, the flags, and the processor."""
    digest = hashlib.sha256()
    waiting, seen = [source.resolve()], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8")
        digest.update(text.encode())
        included = re.findall(r'^#include "([^"]+)"', text, flags=re.MULTILINE)
        waiting += [(path.parent / name).resolve() for name in included]
    digest.update(repr((_identity(compiler), FLAGS, _native_flags(), _processor())).encode())
    return digest.hexdigest()[:16]


def _identity(compiler: list[str]) -> tuple[object, ...]:
    """What changes when the compiler does; asking it for its version would take 10 ms."""
    program = os.path.realpath(shutil.which(compiler[0]) or compiler[0])
    found = os.stat(program)
    return program, found.st_size, found.st_mtime_ns, *compiler[1:]


def _processor() -> str:
    """What distinguishes processors that share a home directory."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", text, flags=re.MULTILINE)
    return "\n".join(sorted(set(lines)) or [platform.processor()])
