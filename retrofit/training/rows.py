"""Samples as rows of tensors, encoded once, kept on disk, and dealt out by step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.runtime.errors import InputError

Rows = Mapping[str, Tensor]
Bucket = tuple[int, Rows]
TOGETHER = 16  # samples that are encoded at a time


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows to train on and rows that are held out, each in buckets of one size.

    Attributes:
        train: By bucket.
        held_out: By bucket.
    """

    train: tuple[Rows, ...]
    held_out: tuple[Rows, ...]

    @property
    def num_train(self) -> int:
        """Rows to train on."""
        return sum(map(count_rows, self.train))

    @property
    def num_held_out(self) -> int:
        """Rows that are held out."""
        return sum(map(count_rows, self.held_out))


def count_rows(rows: Rows) -> int:
    """How many samples rows hold."""
    return len(next(iter(rows.values())))


def take(rows: Rows, index: Tensor | slice, device: Any = None) -> dict[str, Tensor]:
    """Some rows, on a device."""
    return {name: value[index].to(device) for name, value in rows.items()}


def split(buckets: Sequence[Rows], held_out: int, batch: int) -> Dataset:
    """Hold some samples out of every bucket, by its share.

    Raises:
        InputError: If what is left does not fill a batch.
    """
    total = sum(map(count_rows, buckets))
    require_enough(total, held_out, batch)
    train, kept = [], []
    for rows in buckets:
        number = count_rows(rows)
        aside = round(held_out * number / total)
        kept.append(take(rows, slice(0, aside)))
        train.append(take(rows, slice(aside, number)))
    return Dataset(
        train=tuple(rows for rows in train if count_rows(rows)),
        held_out=tuple(rows for rows in kept if count_rows(rows)),
    )


def require_enough(number: int, held_out: int, batch: int) -> None:
    """Refuse too few samples.

    Raises:
        InputError: If what is left does not fill a batch.
    """
    if number < held_out + batch:
        raise InputError(
            f"--data: expected at least {held_out + batch} samples (a batch of {batch}, and "
            f"{held_out} held out), got {number}. Give more, or lower --held-out or --batch."
        )


def deal(dataset: Dataset, steps: int, batch: int, seed: int) -> list[tuple[int, Tensor]]:
    """For every step a bucket, and which of its rows; every row comes once before any comes twice.

    The same on every process, and known before the first step: a run that goes on from a state
    needs its step only.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([count_rows(rows) for rows in dataset.train], dtype=torch.float64)
    chosen = torch.multinomial(sizes, steps, replacement=True, generator=generator).tolist()
    streams = [_endless(int(size), batch, generator) for size in sizes]
    return [(bucket, next(streams[bucket])) for bucket in chosen]


def _endless(size: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(size, generator=generator)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def encode_all(
    count: int,
    encode: Callable[[range], Mapping[str, Tensor]],
    *,
    cache: Path,
    key: Any,
    advance: Callable[[str, int, int], None],
    what: str,
) -> dict[str, Tensor]:
    """Rows of samples, from the file where it holds them already.

    Args:
        count: Samples.
        encode: Rows of some of them.
        cache: Folder of encoded rows.
        key: Everything the rows depend on, as plain data.
        advance: Told of progress.
        what: For the progress bar.
    """
    from safetensors.torch import load_file, save_file

    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    file = cache / f"{digest[:32]}.safetensors"
    if file.is_file():
        return dict(load_file(file))
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, count, TOGETHER):
        advance(what, start, count)
        with torch.no_grad():
            rows = encode(range(start, min(count, start + TOGETHER)))
        for name, value in rows.items():
            parts.setdefault(name, []).append(value.detach().cpu())
    rows = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(rows, partial)
    partial.rename(file)
    return rows
