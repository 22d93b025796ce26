"""Pictures on disk: PNGs that carry the recipe they were made with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.runtime.outputs import PARTIAL, make_folders, refuse_file
from retrofit.runtime.reading import PICTURE_BYTES, open_regular, parse_json
from retrofit.runtime.schema import OTHER_KEYS, Sha256, Within, find_problems

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "retrofit"
SCHEMA = 1
MOST_PICTURES = 10_000
OTHER_ENDINGS = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ModelEntry(TypedDict):
    """What a record says of the checkpoint."""

    fingerprint: Sha256


class PictureRecord(TypedDict, total=False):
    """What a PNG may hold; `Request.from_dict` looks at the request itself."""

    schema: int
    model: Annotated[ModelEntry, OTHER_KEYS]
    place: Annotated[int, Within(0, MOST_PICTURES)]
    request: Mapping[str, Any]
    versions: Mapping[str, str]
    unread: Mapping[str, str]


def name_outputs(out: Path, count: int) -> list[Path]:
    """Names of the pictures: `out` itself for one, numbered for several.

    Raises:
        InputError: If it is no name of a PNG.
    """
    if out.suffix.lower() in OTHER_ENDINGS:
        raise InputError(
            f"-o {out}: expected a name ending in .png, whose metadata holds the recipe. "
            f"Use {out.with_suffix('.png')}."
        )
    if out.suffix.lower() != ".png":
        raise InputError(f"-o {out}: expected a name ending in .png. Use {out}.png.")
    if count == 1:
        return [out]
    digits = len(str(count))
    return [out.with_name(f"{out.stem}-{i + 1:0{digits}}.png") for i in range(count)]


def refuse_outputs(files: list[Path], *, force: bool) -> None:
    """Find out before anything runs that the pictures can't be written.

    Raises:
        InputError: If one exists, or the folder it goes to can't be written to.
    """
    for file in files:
        refuse_file("-o", file)
        if file.exists() and not force:
            raise InputError(f"-o {file}: exists. Give another name, or replace it with --force.")


def write_png(picture: Image, file: Path, record: Mapping[str, Any]) -> None:
    """Write a picture with its record beside its place, then give it its name; makes folders."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, json.dumps({"schema": SCHEMA, **record}, sort_keys=True))
    make_folders(file)
    hidden = file.with_name(f".{file.name}{PARTIAL}{os.getpid()}")
    try:
        with hidden.open("wb") as stream:
            picture.save(stream, format="PNG", pnginfo=info)
            stream.flush()
            os.fsync(stream.fileno())
        hidden.replace(file)
    except BaseException:
        with suppress(OSError):
            hidden.unlink()
        raise


def read_record(file: str | Path) -> dict[str, Any]:
    """The record that `write_png` put into a picture.

    Raises:
        NotFoundError: If the file can't be read.
        InputError: If it is no picture that retrofit made.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        path = Path(file).expanduser()
        with open_regular(path, PICTURE_BYTES) as stream, Image.open(stream) as picture:
            text = getattr(picture, "text", {}).get(KEY)
    except UnidentifiedImageError as error:
        raise InputError(
            f"--like {file}: expected a PNG, got something else. Give one that retrofit made."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise NotFoundError(
            f"--like {file}: can't be read ({reason}). Give a PNG that retrofit made."
        ) from error
    if text is None:
        raise InputError(
            f"--like {file}: holds no recipe of retrofit's. Give a PNG that `retrofit generate` "
            "wrote; other programs drop the metadata when they save one again."
        )
    try:
        data = parse_json(text)
    except ValueError as error:
        raise InputError(f"--like {file}: its recipe is damaged. Give another picture.") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if isinstance(found, int) and found > SCHEMA:
        raise InputError(
            f"--like {file}: its recipe is of a newer retrofit (schema {found}, this one reads "
            f"{SCHEMA}). Upgrade: pip install --upgrade retrofit-attention"
        )
    if found != SCHEMA:
        raise InputError(
            f"--like {file}: its recipe was not written by retrofit, it has no `schema`. Give a "
            "PNG that `retrofit generate` wrote."
        )
    problems = find_problems(data, Annotated[PictureRecord, OTHER_KEYS])
    if problems:
        raise InputError(
            f"--like {file}: its recipe is damaged ({'; '.join(problems)}). Give another picture."
        )
    return data
