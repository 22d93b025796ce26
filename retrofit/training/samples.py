"""Samples to train on: captioned pictures and texts, as people keep them."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retrofit.artifact.planning import Plan
from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.runtime.pictures import choose_pictures, read_photo, warn_left_out
from retrofit.runtime.reading import JSON_BYTES, parse_json, read_text
from retrofit.training.request import FinetuneRequest
from retrofit.training.rows import require_enough

TEXTS = (".txt", ".md", ".rst")
TABLES = (".csv", ".jsonl")
METADATA = ("metadata.jsonl", "metadata.csv")  # as the `datasets` library reads them
CAPTIONS = ("text", "caption", "prompt")  # columns
TABLE_BYTES = 1 << 28
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # of EXIF
DEFAULT_SAMPLES = 256  # that the dense model makes


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A picture on disk, and what is in it."""

    file: Path
    caption: str


def find_captioned(data: str) -> list[Captioned]:
    """The captioned pictures of a folder or of a table that names them.

    A folder holds pictures with a text of the same name beside each (`cat.png`, `cat.txt`), or a
    `metadata.jsonl` or `metadata.csv` with `file_name` and `text`.

    Raises:
        InputError: If a picture has no caption, or a file is missing.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise NotFoundError(f"--data {data}: no such file or folder. Check the path.")
    if path.is_file():
        return _from_table(path)
    for name in METADATA:
        if (path / name).is_file():
            return _from_table(path / name)
    pictures, left_out = choose_pictures(path.iterdir())
    warn_left_out(
        path,
        {
            why: [n for n in names if not n.endswith(".txt")]
            for why, names in left_out.items()
            if any(not n.endswith(".txt") for n in names)
        },
    )
    if not pictures:
        raise InputError(f"--data {data}: expected pictures in it, got none. Check the path.")
    bare = [file.name for file in pictures if not file.with_suffix(".txt").is_file()]
    if bare:
        raise InputError(
            f"--data {data}: {len(bare)} of {len(pictures)} pictures have no caption, such as "
            f"{bare[0]}. Put it into {Path(bare[0]).stem}.txt beside it, or give a metadata.csv "
            "with file_name and text."
        )
    return [
        Captioned(file=file, caption=_read(file.with_suffix(".txt")).strip()) for file in pictures
    ]


def count_samples(plan: Plan, request: FinetuneRequest) -> int | None:
    """How many samples there are, before anything heavy is loaded; None for texts, which are cut.

    Raises:
        InputError: If they can't be used or are too few.
    """
    training = plan.handle.networks[0][0].family.training
    if training is None or training.data == "texts":
        find_texts(request.data)
        return None
    if request.data == "self":
        read_prompts(request.prompts)
        number = request.samples or DEFAULT_SAMPLES
    else:
        found = find_captioned(request.data)[: request.samples]
        for item in found:
            picture_size(item.file)
        number = len(found)
    require_enough(number, request.held_out, request.batch)
    if request.validation_prompts is not None:
        read_prompts(request.validation_prompts, "--validation-prompts")
    return number


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height of a picture, from its first bytes, turned as its camera says.

    Raises:
        InputError: If it is none.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) in SIDEWAYS
            return (picture.height, picture.width) if turned else picture.size
    except OSError:
        photo = read_photo(file)  # opens more kinds, and says what is wrong
        return photo.over().size


def read_picture(file: Path, size: tuple[int, int]) -> Tensor:
    """A picture scaled to cover a size and cut at its middle, `[3, H, W]` in [-1, 1]."""
    from PIL import Image, ImageOps

    picture = read_photo(file).over("white")
    fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(fitted.convert("RGB"), dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


def find_texts(data: str) -> list[str]:
    """The texts of a file or of every text file of a folder, a table's column included.

    Raises:
        InputError: If there are none.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise NotFoundError(f"--data {data}: no such file or folder. Check the path.")
    if path.is_file() and path.suffix in TABLES:
        return [_caption(row, path, i) for i, row in enumerate(_rows(path), 1)]
    files = (
        [path]
        if path.is_file()
        else sorted(
            file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in TEXTS
        )
    )
    texts = [text for text in map(_read, files) if text.strip()]
    if not texts:
        raise InputError(
            f"--data {data}: expected texts (files that end in {', '.join(TEXTS)}), got none."
        )
    return texts


def cut_into_passages(texts: list[str], characters: int, seed: int) -> list[str]:
    """Passages of about a length, in an order drawn from the seed."""
    passages = [
        text[start : start + characters]
        for text in texts
        for start in range(0, len(text), characters)
        if len(text) < characters or len(text) - start >= characters // 2
    ]
    random.Random(seed).shuffle(passages)
    return passages


def read_prompts(file: str | None, option: str = "--prompts") -> list[str]:
    """A caption a line.

    Raises:
        InputError: If the file is missing or empty.
    """
    if file is None:
        raise InputError(
            "--data self: expected captions of what the dense model is to draw. Add --prompts "
            "FILE with one a line."
        )
    path = Path(file).expanduser()
    if not path.is_file():
        raise NotFoundError(f"{option} {file}: no such file. Check the path.")
    prompts = [line.strip() for line in _read(path).splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{option} {file}: expected a caption a line, got an empty file.")
    return prompts


def _from_table(table: Path) -> list[Captioned]:
    if table.suffix not in TABLES:
        raise InputError(
            f"--data {table}: expected a folder, a .csv or a .jsonl file, got {table.name!r}."
        )
    found = []
    for i, row in enumerate(_rows(table), 1):
        name = row.get("file_name") or row.get("image")
        if not name:
            raise InputError(
                f"{table}, row {i}: expected a column file_name, got {', '.join(row)}."
            )
        file = table.parent / name
        if not file.is_file():
            raise InputError(f"{table}, row {i}: {name}: no such file beside the table.")
        found.append(Captioned(file=file, caption=_caption(row, table, i)))
    if not found:
        raise InputError(f"{table}: expected rows of file_name and text, got none.")
    return found


def _rows(table: Path) -> list[Mapping[str, str]]:
    text = read_text(table, TABLE_BYTES)
    if table.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    rows: list[Mapping[str, str]] = []
    for i, line in enumerate(text.splitlines(), 1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise InputError(f"{table}, line {i}: expected JSON: {error}.") from error
        if row is not None:
            rows.append({str(k): str(v) for k, v in row.items()} if isinstance(row, dict) else {})
    return rows


def _caption(row: Mapping[str, str], table: Path, number: int) -> str:
    for column in CAPTIONS:
        if row.get(column):
            return str(row[column])
    raise InputError(
        f"{table}, row {number}: expected a column {' or '.join(CAPTIONS)}, got {', '.join(row)}."
    )


def _read(file: Path) -> str:
    try:
        return read_text(file, JSON_BYTES)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected a text in UTF-8, got something else.") from error
