"""`retrofit verify`: check a patched checkpoint in a fresh process."""

from __future__ import annotations

from pathlib import Path

from retrofit.commands import options
from retrofit.commands.console import count, print_json, print_lines, progress, result, say


def run(
    out: options.Patched,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    r"""Check every byte of a patched checkpoint and repeat its proof in a fresh process.

    Exit code 1 when a file, the record or the output is not what was recorded. Without a recorded
    proof only the files are checked, and it says so. A load compares less: sizes and samples, and
    every byte only of files that are newer than retrofit.json.

    An export is run again on its probe.

    [bold]Examples[/bold]

    $ retrofit verify minilm-sparse/
    files: 13 of 13 are byte for byte what was patched
    proof: repeated in a fresh process, identical
    minilm-sparse/ is verified

    $ retrofit verify minilm-sparse/        # after a byte of the weights was flipped
    error: minilm-sparse/model.safetensors: its bytes changed since patching. Restore it, ...

    [bold]In Python[/bold]

    from retrofit.artifact.verifying import verify_checkpoint
    verify_checkpoint("minilm-sparse/").proof
    """
    options.set_threads(threads)
    if (Path(out) / "export.json").is_file():
        _verify_export(Path(out), json=json)
        return
    from retrofit.artifact.verifying import require_patched, verify_checkpoint
    from retrofit.checkpoints import find_checkpoint
    from retrofit.commands.patch import keep_measured, summarize_proof
    from retrofit.patching.recipe import Recipe, method_names

    manifest = require_patched(find_checkpoint(out))
    records = [*manifest.files.values(), *manifest.configs.values()]
    if manifest.proof is not None:
        say("checking files, then repeating the proof in a fresh process ...")
    with progress("checking", sum(record.size for record in records)) as advance:
        found = verify_checkpoint(
            out, device=device, dtype=dtype, trust_remote_code=trust_remote_code, advance=advance
        )

    if json:
        print_json(
            result(
                family=manifest.family[0] if manifest.family else None,
                method=method_names(manifest.recipe),
                patched=manifest.patched,
                skipped=[(path, reason) for path, reason in manifest.skipped],
                keep_asked=Recipe.from_dict(manifest.recipe).keep,
                keep_measured=keep_measured(found.repeated),
                verified=True,
                files=found.num_files,
                added=list(found.added),
                proof=found.proof,
                repeated=found.repeated and summarize_proof(found.repeated),
            )
        )
        return
    number = found.num_files
    lines = [f"files: {number} of {number} are byte for byte what was patched"]
    if found.added:
        lines.append(f"added since, without effect: {', '.join(found.added[:5])}")
    if found.proof == "none":
        lines.append("proof: none was recorded when it was patched, so its output was not checked")
        lines.append(f"{out}: {count(number, 'file')} verified, the output not")
    else:
        agreed = "identical" if found.proof == "identical" else "the same within tolerance"
        lines += [f"proof: repeated in a fresh process, {agreed}", f"{out} is verified"]
    print_lines(*lines)


def _verify_export(folder: Path, *, json: bool) -> None:
    """Run an export on its probe in a fresh process."""
    from retrofit.commands.export import as_json, tell
    from retrofit.export import verify_export

    record = verify_export(folder)
    if json:
        print_json({**as_json(record, folder), "verified": True})
    else:
        tell(record, folder)
        print_lines(f"{folder} is verified")
