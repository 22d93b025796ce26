"""Read pictures: upright, 8 bits, with their alpha; and tell which files of a folder are some."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.runtime.reading import PICTURE_BYTES, read_bytes

logger = logging.getLogger(__name__)
HEIF = (".heic", ".heif", ".hif")
ENDINGS = (
    *(".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp", *HEIF),
)
BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # of HEIF files
NEEDS_HEIF = "HEIC takes pillow-heif: pip install pillow-heif"
ORIENTATION = 0x0112  # EXIF
LISTED = 3  # names for one reason
UNSEEN = ("desktop.ini", "thumbs.db")  # and what begins with a dot

LeftOut = Mapping[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A picture as it is looked at.

    Attributes:
        picture: Upright, 8 bits: RGBA where something is transparent, else RGB.
        orientation: How the file's pixels lie, as EXIF counts it; 1 is upright.
    """

    picture: Image.Image
    orientation: int = 1

    @property
    def alpha(self) -> Image.Image | None:
        """Opacity in mode L; None where all is opaque."""
        return self.picture.getchannel("A") if self.picture.mode == "RGBA" else None

    def over(self, colour: str = "white") -> Image.Image:
        """RGB, what is transparent filled with a colour."""
        if self.picture.mode == "RGB":
            return self.picture
        ground = Image.new("RGBA", self.picture.size, colour)
        return Image.alpha_composite(ground, self.picture).convert("RGB")


def read_photo(path: str | Path, *, what: str = "", data: bytes | None = None) -> Photo:
    """Read a picture; of several frames the first.

    Args:
        path: The file.
        what: The option that names it, for messages.
        data: The file's bytes, where they have been read already.

    Raises:
        NotFoundError: If the file does not exist.
        InputError: If it is no picture, a damaged one, or one of floats.
    """
    where = f"{what} {path}".strip()
    try:
        data = read_bytes(Path(path), PICTURE_BYTES) if data is None else data
        _register_heif()
        with Image.open(BytesIO(data)) as opened:
            orientation = opened.getexif().get(ORIENTATION, 1)
            return Photo(
                picture=_to_8_bits(ImageOps.exif_transpose(opened), where), orientation=orientation
            )
    except FileNotFoundError as error:
        raise NotFoundError(f"{where}: no such file. Check the path.") from error
    except UnidentifiedImageError as error:
        if _is_heif(data or b""):
            raise InputError(f"{where}: {NEEDS_HEIF}") from error
        raise InputError(
            f"{where}: expected a picture, got something else. Give a PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{where}: expected a picture, got one of more pixels than Pillow opens. "
            "Make it smaller."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "a damaged one"
        raise InputError(
            f"{where}: expected a picture, got {reason}. Save it again as PNG or JPEG."
        ) from error


def _to_8_bits(picture: Image.Image, where: str) -> Image.Image:
    picture.load()
    if picture.mode == "F":
        raise InputError(f"{where}: expected 8 or 16 bits, got floats. Save it as PNG or JPEG.")
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scale
        picture = Image.fromarray((np.clip(np.array(picture), 0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            return picture
    return picture.convert("RGB")


def choose_pictures(files: Iterable[Path]) -> tuple[list[Path], LeftOut]:
    """Sort files by name into pictures that can be read and others.

    Args:
        files: Files and folders, of one folder or pattern.

    Returns:
        The pictures, sorted, and the names of the others by the reason why they are left out.
        Files that are not meant to be seen are in neither, nor are folders without pictures.
    """
    chosen: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for file in sorted(files):
        reason = _why_not(file)
        if reason is None:
            chosen.append(file)
        elif reason:
            left_out.setdefault(reason, []).append(file.name)
    return chosen, left_out


def _why_not(file: Path) -> str | None:
    """Why a file is left out, None where it is not; empty where that needs no word."""
    ending = file.suffix.lower()
    if file.name.startswith(".") or file.name.lower() in UNSEEN:
        return ""
    if file.is_dir():
        return "folders below are not looked into" if holds_pictures(file) else ""
    if ending not in ENDINGS:
        return "no ending of a picture"
    if ending in HEIF and not _register_heif():
        return NEEDS_HEIF
    Image.init()
    if ending not in Image.registered_extensions():
        return f"this Pillow reads no {ending[1:].upper()}: pip install --upgrade pillow"
    return None


def holds_pictures(folder: Path) -> bool:
    """Whether a folder holds files that are called like pictures, readable or not."""
    return any(
        file.suffix.lower() in ENDINGS and not file.name.startswith(".") and file.is_file()
        for file in folder.iterdir()
    )


def describe_left_out(left_out: LeftOut) -> str:
    """One line: how many for each reason, and some names."""
    parts = []
    for reason, names in left_out.items():
        more = [f"{len(names) - LISTED} more"] if len(names) > LISTED else []
        parts.append(f"{len(names)} ({', '.join([*names[:LISTED], *more])}): {reason}")
    return "; ".join(parts)


def warn_left_out(where: str | Path, left_out: LeftOut) -> None:
    """Say what of a folder or pattern is not taken, and why."""
    if left_out:
        logger.warning("%s: left out %s", where, describe_left_out(left_out))


def _register_heif() -> bool:
    """Teach Pillow HEIC where pillow-heif is installed, and say whether it is."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in BRANDS
