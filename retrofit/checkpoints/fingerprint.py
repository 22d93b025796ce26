"""Fingerprints of files: all of their bytes, or samples that a load can afford."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from retrofit.runtime.reading import open_regular
from retrofit.runtime.schema import Sha256, Within

LEARNED = "retrofit.safetensors"  # learned parts of a patch, beside its record
CHUNK = 1 << 20
SAMPLE = 1 << 16
SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Fingerprint of a file.

    Attributes:
        size: Bytes.
        sha256: Of all of it.
        sample: sha256 of pieces spread over it, which a load can afford to check.
    """

    size: Annotated[int, Within(0, 2**60)]
    sha256: Sha256
    sample: Sha256

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        """Of a file that is there."""
        return cls(size=file.stat().st_size, sha256=hash_file(file), sample=sample_file(file))

    def matches(self, file: Path, *, written_before: int) -> bool:
        """Whether a file is the one recorded.

        Size and samples tell, in milliseconds; a file that was written to after the record was is
        read whole, which takes about a second a gigabyte.

        Args:
            file: What to look at.
            written_before: When the record was written, in nanoseconds.
        """
        found = file.stat()
        if found.st_size != self.size or sample_file(file) != self.sample:
            return False
        return found.st_mtime_ns <= written_before or hash_file(file) == self.sha256


def sample_file(file: Path) -> str:
    """sha256 of a file's size and of pieces spread evenly over it, its ends included."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for i in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def hash_file(file: Path, advance: Callable[[int], object] = lambda amount: None) -> str:
    """sha256 of a file; `advance` is told of every number of bytes read."""
    digest = hashlib.sha256()
    with open_regular(file) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
