"""Compile a C kernel once into the user's cache and load it; say why where that can't be done."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
TIMEOUT = 120.0  # seconds that a compiler may take

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
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "retrofit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "retrofit"
    return Path.home() / ".cache" / "retrofit"


@lru_cache(maxsize=16)
def _load(source: Path) -> Loaded:
    """Look once per source: making paths would take a good part of a short call."""
    cache = cache_directory()
    if os.name != "posix":
        return None, f"no native kernel for {platform.system()}"
    name = f"{source.parent.name}-{_fingerprint(source)}.so"
    reasons = []
    # a home that can't be written, or that allows no execution, is common in containers
    for directory in (cache, Path(tempfile.gettempdir()) / f"retrofit-{os.getuid()}"):
        library, reason = _load_from(directory, name, source)
        if library is not None:
            return library, f"compiled into {directory}"
        reasons.append(reason)
        if reason.startswith("no C compiler"):
            break
    return None, "; ".join(dict.fromkeys(reasons))


def _load_from(directory: Path, name: str, source: Path) -> Loaded:
    if reason := _refuse_directory(directory):
        return None, reason
    path = directory / name
    if not path.exists() and (reason := _build_locked(source, path)):
        return None, reason
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return None, f"{path} can't be loaded: {error}"


def _refuse_directory(directory: Path) -> str:
    """Make a directory that only its owner writes to; the reason if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError as error:
        return f"{directory} can't be made: {error.strerror}"
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{directory} can be written by others"
    return "" if os.access(directory, os.W_OK | os.X_OK) else f"{directory} can't be written"


def _build_locked(source: Path, path: Path) -> str:
    """Compile unless another process has done so meanwhile; the reason if it fails."""
    import fcntl

    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return "" if path.exists() else _build(source, path)


def _build(source: Path, path: Path) -> str:
    """Compile beside `path`, then rename: a half-written library is never seen."""
    compiler = find_compiler()
    if compiler is None:
        return f"no C compiler ({', '.join(COMPILERS)}, or $CC); install one, gcc for example"
    reason = ""
    for native in (_native_flags(), ()):
        handle, beside = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
        try:
            command = [*compiler, *FLAGS, *native, str(source), "-o", beside, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            if done.returncode == 0:
                os.replace(beside, path)
                return ""
            lines = done.stderr.strip().splitlines() or ["no message"]
            first = next((line for line in lines if "error" in line), lines[0])
            reason = f"{shlex.join(compiler)} failed with status {done.returncode}: {first}"
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"{shlex.join(compiler)} did not run: {error}"
        finally:
            Path(beside).unlink(missing_ok=True)
    return reason


def find_compiler() -> list[str] | None:
    """The command of the C compiler: `$CC`, else the first of `COMPILERS` that is installed."""
    given = shlex.split(os.environ.get("CC", ""))
    if given and shutil.which(given[0]):
        return given
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def _native_flags() -> tuple[str, ...]:
    """Ask for the instructions of this very processor."""
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    return ("-mcpu=native",) if is_arm else ("-march=native",)


def _fingerprint(source: Path) -> str:
    """Of the source with its own includes, the flags, and the processor it is compiled for."""
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
    digest.update(repr((FLAGS, _native_flags(), _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What distinguishes processors that share a home directory."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", text, flags=re.MULTILINE)
    return "\n".join(sorted(set(lines)) or [platform.processor()])
