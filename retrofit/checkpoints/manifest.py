"""`retrofit.json`: what was patched, the fingerprint of every file beside it, and the proof."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from retrofit.checkpoints.fingerprint import LEARNED, FileRecord
from retrofit.checkpoints.places import is_inside, is_plain_name
from retrofit.checkpoints.record_types import Record
from retrofit.runtime.errors import CheckpointError, VerificationError
from retrofit.runtime.reading import JSON_BYTES, parse_json, read_bytes
from retrofit.runtime.schema import find_problems

MANIFEST = "retrofit.json"
SCHEMA = 3
RULES_SCHEMA = 2  # of a recipe of several rules, or with learned parts
SHORT_SCHEMA = 1  # of a recipe that every version reads: one rule, nothing learned


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `retrofit.json`.

    Attributes:
        source: Name of the checkpoint that was patched (a hub id, or a folder's last part).
        family: Families of the patched networks.
        recipe: As `Recipe.to_dict` gives it.
        sites: Of every patched site its network, path (a hint), index, block and kind.
        changed: Paths of the other modules that the method changes.
        skipped: `[path, reason]` of every site left dense.
        files: Fingerprints by path of the source's own files.
        configs: The same for what the patch added: configs beside a single-file checkpoint, learned
            parts.
        single_file: Name of the file of such a checkpoint, else empty.
        versions: Of Python and the libraries it was written with.
        proof: See `retrofit.artifact.proof`; None when it was not asked for.
        tuned: How it was fine-tuned; None where the weights are the source's.
    """

    source: str
    family: tuple[str, ...]
    recipe: Mapping[str, Any]
    sites: Sequence[Mapping[str, Any]]
    changed: Sequence[str]
    skipped: Sequence[Sequence[str]]
    files: Mapping[str, FileRecord]
    configs: Mapping[str, FileRecord] = field(default_factory=dict)
    single_file: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    proof: Mapping[str, Any] | None = None
    tuned: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the record of a patched checkpoint.

        Raises:
            CheckpointError: If it is not a record of this schema.
            VerificationError: If it was edited after it was written.
        """
        where = folder / MANIFEST
        try:
            data = parse_json(read_bytes(where, JSON_BYTES))
        except ValueError as error:
            raise CheckpointError(f"{where}: expected JSON: {error}. {_PATCH_AGAIN}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise CheckpointError(
                f"{where}: written by a newer retrofit (schema {schema}, this one reads {SCHEMA}). "
                "Upgrade: pip install --upgrade retrofit-attention"
            )
        if schema not in range(SHORT_SCHEMA, SCHEMA + 1):
            raise CheckpointError(
                f"{where}: expected `schema` {SHORT_SCHEMA} to {SCHEMA}, got {schema!r}. "
                f"{_PATCH_AGAIN}"
            )
        problems = _check_keys(data)
        if problems:
            raise CheckpointError(f"{where}: {'; '.join(problems)}. {_PATCH_AGAIN}")
        if data["digest"] != _digest(data):
            raise VerificationError(
                f"{where}: edited after it was written, so its proof says nothing. {_PATCH_AGAIN}"
            )
        problems = find_problems(data, Record) or _check_places(data)
        if problems:
            raise CheckpointError(f"{where}: {'; '.join(problems)}. {_PATCH_AGAIN}")
        records = {
            key: {path: FileRecord(**record) for path, record in data[key].items()}
            for key in ("files", "configs")
        }
        rest = {k: v for k, v in data.items() if k not in ("schema", "digest", *records)}
        return cls(**{**rest, **records, "family": tuple(data["family"])})

    @property
    def has_learned(self) -> bool:
        """Whether learned parts lie beside it."""
        return LEARNED in self.configs

    @property
    def has_own_weights(self) -> bool:
        """Whether its weights are no longer the source's."""
        return self.tuned is not None and self.tuned["train"] in ("all", "attention")

    @property
    def patched(self) -> list[str]:
        """Paths of the patched sites, with their network."""
        return [
            ".".join(part for part in (site["network"], site["path"]) if part)
            for site in self.sites
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the schema in front and a digest of the whole at the end."""
        needs_rules = "rules" in self.recipe or LEARNED in self.configs
        schema = SCHEMA if self.tuned else RULES_SCHEMA if needs_rules else SHORT_SCHEMA
        data: dict[str, Any] = {"schema": schema}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "tuned" and value is None:
                continue
            if item.name in ("files", "configs"):
                value = {path: vars(record) for path, record in sorted(value.items())}
            data[item.name] = value
        data = json.loads(json.dumps(data))
        data["digest"] = _digest(data)
        return data

    def write(self, folder: Path) -> None:
        """Write `retrofit.json` and flush it to the disk."""
        with (folder / MANIFEST).open("w") as stream:
            stream.write(json.dumps(self.to_dict(), indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def check_files(self, folder: Path) -> None:
        """Compare every file with its record, as far as a load can afford it.

        The record is the last that a patch writes. A file that is newer, because it was edited
        here or downloaded, is read whole; of the others sizes and samples are compared.

        Raises:
            VerificationError: If a file is missing or another one than was recorded.
        """
        written = folder / MANIFEST
        # a source that `unpatch` wrote has no record beside it
        written_before = written.stat().st_mtime_ns if written.is_file() else 0
        for path, record in {**self.files, **self.configs}.items():
            file = folder / path
            if not file.is_file():
                raise VerificationError(f"{file}: missing, though {MANIFEST} lists it. {RESTORE}")
            if not record.matches(file, written_before=written_before):
                found = file.stat().st_size
                other = f", or it is another file: {found} bytes, {record.size} recorded"
                raise VerificationError(
                    f"{file}: its bytes changed since patching"
                    f"{'' if found == record.size else other}. {RESTORE}"
                )


_PATCH_AGAIN = "Run `retrofit patch` on the source again, into another folder."
RESTORE = "Restore it, or run `retrofit patch` on the source again, into another folder."


def _digest(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_places(data: Mapping[str, Any]) -> list[str]:
    """What of a record would lead out of the checkpoint's folder."""
    listed = {**data["files"], **data["configs"]}
    problems = [
        f"files: {path!r} leads out of the checkpoint" for path in listed if not is_inside(path)
    ]
    single = data["single_file"]
    if single and (single not in data["files"] or not is_plain_name(single)):
        problems.append(f"single_file: expected the name of one of its files, got {single!r}")
    return problems


def _check_keys(data: Mapping[str, Any]) -> list[str]:
    expected = {"schema", "digest", *(item.name for item in fields(Manifest))}
    problems = [f"has no {key!r}" for key in sorted(expected - data.keys() - {"tuned"})]
    return problems + [f"{key!r} is no key of it" for key in sorted(data.keys() - expected)]
