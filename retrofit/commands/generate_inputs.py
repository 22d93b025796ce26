"""What `retrofit generate` was asked for, from its options and from a picture made before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.commands.console import say
from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.runtime.reading import read_text

if TYPE_CHECKING:
    from retrofit.sampling import Generator
    from retrofit.sampling.request import Request

DEFAULT_MODEL = "shapes"


def read_lora(text: str) -> tuple[str, float]:
    """`file.safetensors:0.8` as path and weight; the weight is 1 if there is none."""
    path, separator, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if separator else (text, 1.0)
    except ValueError:
        return text, 1.0


def read_input(path: Path | None, name: str) -> Any:
    """The file of a picture that goes in, looked at; the name is its field's."""
    from retrofit.sampling.request import InputFile

    return None if path is None else InputFile.read(path, f"--{name.replace('_', '-')}")


def read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """Those given and those of a file.

    Raises:
        InputError: If the file can't be read or is empty.
    """
    if file is None:
        return list(prompts or [])
    try:
        lines = read_text(file.expanduser()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise NotFoundError(
            f"--prompt-file {file}: can't be read ({reason}). Give a text file with one prompt a "
            "line."
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"--prompt-file {file}: holds no prompt. Write one a line.")
    return [*(prompts or []), *found]


def make_request(
    model: str | None,
    prompts: list[str],
    seed: int | None,
    num_images: int,
    batch: int,
    given: dict[str, Any],
    like: Path | None,
    *,
    patched: bool,
) -> tuple[Request, int | None, dict[str, Any] | None]:
    """The request, which of its pictures is wanted (None: all), and the record of --like."""
    from retrofit.sampling.request import Request

    given = {key: value for key, value in given.items() if value is not None}
    if like is None:
        pictures = [text for text in prompts for _ in range(num_images)]
        seeds = tuple((seed or 0) + i for i in range(len(pictures)))
        if not pictures:
            raise InputError(
                'expected --prompt or --prompt-file. Say what to draw, as in -p "a cat".'
            )
        request = Request(
            model=model or DEFAULT_MODEL,
            prompts=tuple(pictures),
            seeds=seeds,
            batch=batch,
            **given,
        )
        return request, None, None
    from retrofit.sampling.png import read_record

    record = read_record(like)
    request = Request.from_dict(record.get("request", {}), f"--like {like}")
    place = record.get("place", 0)
    if place >= len(request.prompts):
        raise InputError(
            f"--like {like}: its recipe is damaged (place: expected less than the "
            f"{len(request.prompts)} prompts, got {place}). Give another picture."
        )
    _name_what_is_fetched(request, given | ({"model": model} if model else {}), like)
    if len(prompts) > 1 or num_images > 1:
        raise InputError("--like: makes one picture. Give one --prompt at most, and no -n.")
    if prompts or seed is not None:
        request, place = request.only([place]), 0
    changes = dict(given)
    if model:
        changes |= {"model": model, "config": given.get("config", "")}
    if prompts:
        changes["prompts"] = tuple(prompts)
    if seed is not None:
        changes["seeds"] = (seed,)
    if patched:
        changes["recipe"] = None
    request = replace(request, **changes)
    request.check_files()
    _note_other_versions(record, like)
    return request, place, None if model else record


def _name_what_is_fetched(request: Request, given: dict[str, Any], like: Path) -> None:
    """Name what a picture asks for and this machine's disk does not have, before it is fetched."""
    from retrofit.checkpoints.bundled import BUNDLED

    named = [("model", "model", None if request.model in BUNDLED else request.model)]
    for field in ("config", "controlnet", "ip_adapter"):
        named.append((field, f"--{field.replace('_', '-')}", getattr(request, field)))
    named += [("loras", "--lora", path) for path, _ in request.loras]
    for field, what, source in named:
        if source and field not in given and not Path(source).expanduser().exists():
            say(f"note: {like} names {what} {source}, which is not on this disk: asking the hub")


def _note_other_versions(record: dict[str, Any], like: Path) -> None:
    """Say which libraries have changed since a picture was made: its pixels may too."""
    from retrofit.runtime.versions import current_versions

    now = current_versions()
    changed = [
        f"{name} {version}"
        for name, version in record.get("versions", {}).items()
        if now.get(name) != version
    ]
    if changed:
        say(f"note: {like} was made with {', '.join(changed)}; pixels may differ with others")


def refuse_other_model(
    generator: Generator, record: dict[str, Any] | None, like: Path | None
) -> None:
    """Refuse a checkpoint that changed since the picture of `--like` was made.

    Raises:
        InputError: If its weights are others now.
    """
    from retrofit.sampling.pipelines import fingerprint

    if record is None or record.get("model", {}).get("fingerprint") == fingerprint(
        generator.checkpoint
    ):
        return
    raise InputError(
        f"--like {like}: made with other weights than {generator.request.model} has now. Name the "
        "checkpoint, as in `retrofit generate MODEL --like ...`, to take it all the same."
    )


def note_replaced_patch(generator: Generator) -> None:
    """Say that `--method` or `--recipe` takes the place of what a checkpoint was saved with."""
    from retrofit.patching.recipe import method_names

    manifest, recipe = generator.checkpoint.manifest, generator.request.recipe
    if manifest is not None and recipe is not None:
        say(
            f"note: {generator.request.model} was saved with {method_names(manifest.recipe)}; "
            f"{method_names(recipe)} replaces it, as asked here"
        )


def name_files(
    out: Path, number: int, preview: bool, request: Request, *, force: bool
) -> list[Path]:
    """Names of the pictures, after a look at what would be replaced.

    Raises:
        InputError: If one can't be written, or would replace a picture that goes in.
    """
    from retrofit.sampling.png import name_outputs, refuse_outputs

    files = name_outputs(out, number)
    written = [*files, preview_of(files[0])] if preview else files
    refuse_outputs(written, force=force)
    for option, read in request.files().items():
        source = Path(read.path).expanduser()
        for file in written:
            if file.exists() and source.exists() and file.samefile(source):
                raise InputError(
                    f"-o {file}: is the picture that {option} reads, which --force does not "
                    "replace. Give another name."
                )
    return files


def refuse_sheet(file: Path | None, *, force: bool) -> None:
    """Refuse a contact sheet that can't be written or would replace a file.

    Raises:
        InputError: If so.
    """
    from retrofit.commands.options import refuse_picture

    refuse_picture("--sheet", file, (".png",))
    if file is not None and file.exists() and not force:
        raise InputError(f"--sheet {file}: exists. Give another name, or replace it with --force.")


def preview_of(file: Path) -> Path:
    """Where the preview of a picture goes."""
    return file.with_name(f"{file.stem}-preview.png")
