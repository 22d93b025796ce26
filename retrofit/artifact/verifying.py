"""Verify a patched checkpoint: its files, its record, and its proof in a fresh process."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrofit.checkpoints import Checkpoint, find_checkpoint
from retrofit.checkpoints.fingerprint import hash_file
from retrofit.checkpoints.manifest import MANIFEST, RESTORE, Manifest
from retrofit.checkpoints.places import list_files
from retrofit.runtime.child_process import run_child
from retrofit.runtime.errors import CheckpointError, RetrofitError, VerificationError

logger = logging.getLogger(__name__)
MEANINGFUL = (".safetensors", ".json")  # an added file of these kinds can change what is loaded


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        manifest: The record that was checked.
        proof: `identical`, `within tolerance` (another machine), or `none` when none was recorded.
        repeated: The proof's data from the fresh process.
        num_files: Files whose every byte was checked.
        added: Files that the record does not know and that change nothing.
    """

    manifest: Manifest
    proof: Literal["identical", "within tolerance", "none"]
    repeated: dict[str, Any] | None
    num_files: int
    added: tuple[str, ...]


def require_patched(checkpoint: Checkpoint) -> Manifest:
    """The record of a patched checkpoint.

    Raises:
        CheckpointError: If it is not patched.
    """
    if checkpoint.manifest is None:
        raise CheckpointError(
            f"{checkpoint.name}: not a patched checkpoint, it has no {MANIFEST}. "
            "`retrofit patch` makes one."
        )
    return checkpoint.manifest


def verify_checkpoint(
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    advance: Callable[[int], object] = lambda amount: None,
) -> Verification:
    """Check every byte and repeat the recorded proof in a fresh process.

    Args:
        folder: A patched checkpoint, or its hub id.
        device: Where to repeat it; None takes the recorded one where there is one, else the CPU.
        dtype: In which dtype; None takes the recorded one.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        advance: Told of every number of bytes checked.

    Raises:
        CheckpointError: If it is not a patched checkpoint.
        VerificationError: If a file, the record or the output is not what was recorded.
    """
    checkpoint = find_checkpoint(folder)
    manifest = require_patched(checkpoint)
    added = check_all_files(checkpoint.root, manifest, advance)
    proof, repeated = manifest.proof, None
    outcome: Literal["identical", "within tolerance", "none"] = "none"
    if proof is not None:
        from retrofit.artifact.proof import compare_proofs, is_identical

        repeated = _repeat(folder, device, dtype, trust_remote_code)
        problems = compare_proofs(proof, repeated)
        if problems:
            raise VerificationError(f"{folder}: {'; '.join(problems)}. {RESTORE}")
        outcome = "identical" if is_identical(proof, repeated) else "within tolerance"
    return Verification(
        manifest=manifest,
        proof=outcome,
        repeated=repeated,
        num_files=len(manifest.files) + len(manifest.configs),
        added=added,
    )


def check_all_files(
    root: Path, manifest: Manifest, advance: Callable[[int], object]
) -> tuple[str, ...]:
    """Compare every byte with the fingerprint; returns harmless files that were added.

    Raises:
        VerificationError: If a file is missing, changed, or one was added that matters.
    """
    manifest.check_files(root)
    recorded = {**manifest.files, **manifest.configs}
    for path, record in recorded.items():
        if hash_file(root / path, advance) != record.sha256:
            raise VerificationError(f"{root / path}: its bytes changed since patching. {RESTORE}")
    added = [path for path in list_files(root) if path not in recorded and path != MANIFEST]
    for path in added:
        if path.endswith(MEANINGFUL):
            raise VerificationError(
                f"{root / path}: was added after patching and may change what is loaded. Remove it."
            )
    return tuple(added)


def _repeat(
    folder: str | Path, device: str | None, dtype: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Repeat the proof in a fresh process."""
    request = {
        "folder": str(folder),
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    done = run_child("retrofit.artifact.verifying", [json.dumps(request)])
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise VerificationError(
            f"{folder}: the fresh process ended with code {done.returncode}: {last}"
        ) from error
    for note in answer.get("notes", ()):
        logger.warning("%s", note)
    if "error" in answer:
        raise VerificationError(f"{folder}: in a fresh process: {answer['error']}")
    return answer["proof"]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does."""
    from retrofit.artifact.adapter import add_adapter
    from retrofit.artifact.proof import repeat_proof
    from retrofit.artifact.records import read_learned
    from retrofit.checkpoints.opening import load_networks
    from retrofit.patching.recipe import Recipe
    from retrofit.runtime.devices import pick_device

    checkpoint = find_checkpoint(request["folder"])
    manifest = require_patched(checkpoint)
    proof = manifest.proof or {"networks": []}
    recipe = read_learned(manifest, Recipe.from_dict(manifest.recipe, MANIFEST), checkpoint.root)
    components = [""]
    if checkpoint.pipeline_class is not None:
        components = [entry["name"].split(".")[0] for entry in proof["networks"]]
        components += recipe.components
    dtypes = {entry["dtype"] for entry in proof["networks"]}
    target = load_networks(
        checkpoint,
        list(dict.fromkeys(components)),
        device=pick_device(request["device"] or proof.get("device"), fall_back=True),
        dtype=request["dtype"] or (dtypes.pop() if len(dtypes) == 1 else None),
        trust_remote_code=request["trust_remote_code"],
    )
    add_adapter(target, recipe.components, checkpoint.root)
    return {"proof": repeat_proof(target, recipe, proof)}


def main() -> None:
    """Take a request as the argument, answer with one line of JSON."""
    notes = _Notes()
    logging.getLogger("retrofit").addHandler(notes)
    try:
        answer = _answer(json.loads(sys.argv[1]))
    except RetrofitError as error:
        answer = {"error": " ".join(str(error).split())}
    sys.stdout.write(json.dumps({**answer, "notes": notes.texts}) + "\n")


class _Notes(logging.Handler):
    """Keeps what the fresh process warns of for the one that asked."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


if __name__ == "__main__":
    main()
