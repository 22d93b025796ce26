"""`retrofit unpatch`: the source of a patched checkpoint again."""

from __future__ import annotations

from retrofit.commands import options
from retrofit.commands.console import count, format_bytes, print_json, print_lines, progress, result


def run(
    patched: options.Patched,
    out: options.Out,
    link: options.Link = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    r"""Write the checkpoint that a patched one was made from, byte for byte.

    Every byte is compared with the fingerprint taken at patch time; if one differs, nothing is
    written and the exit code is 1.

    [bold]Examples[/bold]

    $ retrofit unpatch minilm-sparse/ -o minilm-again/
    wrote minilm-again/: 13 files, 91.6 MB, every hash as in the source

    [bold]In Python[/bold]

    retrofit.unpatch("minilm-sparse/", "minilm-again/")
    """
    from retrofit.artifact.saving import unpatch
    from retrofit.artifact.verifying import require_patched
    from retrofit.checkpoints import find_checkpoint
    from retrofit.patching.recipe import method_names

    manifest = require_patched(find_checkpoint(patched))
    size = sum(record.size for record in manifest.files.values())
    with progress("linking" if link else "copying", size) as advance:
        unpatch(patched, out, link=link, force=force, advance=advance)

    if json:
        print_json(
            result(
                family=manifest.family[0] if manifest.family else None,
                method=method_names(manifest.recipe),
                out=str(out),
                files=len(manifest.files),
                bytes=size,
                sha256={path: record.sha256 for path, record in manifest.files.items()},
            )
        )
        return
    print_lines(
        f"wrote {out}: {count(len(manifest.files), 'file')}, {format_bytes(size)}, "
        "every hash as in the source"
    )
