"""The images of a scene: files, folders, globs, or every n-th frame of a video."""

from __future__ import annotations

import glob
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from retrofit.runtime.errors import InputError, NotFoundError, UnsupportedError
from retrofit.runtime.pictures import (
    choose_pictures,
    describe_left_out,
    holds_pictures,
    warn_left_out,
)
from retrofit.runtime.reading import require_regular

logger = logging.getLogger(__name__)
LISTED = 4  # folders in a message
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def find_images(given: Sequence[str | Path]) -> list[Path]:
    """Turn what a user named into files, in their order; folders and globs sorted by name.

    Args:
        given: Files, folders (their images, not those of folders below), globs. A warning says
            what of a folder or a glob is left out, and why.

    Raises:
        NotFoundError: If a name stands for nothing.
        InputError: If nothing is left, or a file is named twice.
    """
    found: list[Path] = []
    for name in map(str, given):
        path = Path(name).expanduser()
        if path.is_dir():
            found += _in_folder(path)
        elif path.exists():
            require_regular(path, path.stat())
            found.append(path)
        elif glob.has_magic(name):
            matched = [Path(match) for match in glob.glob(str(path), recursive=True)]
            if not matched:
                raise NotFoundError(f"{name}: no file of that pattern. Check the folder.")
            found += _choose(name, matched)
        else:
            raise NotFoundError(f"{name}: no such file or folder. Check the path.")
    if not found:
        raise InputError("reconstruct: expected images, got none. Name files, a folder or a video.")
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise InputError(f"{path}: is named twice. A view may come in once only.")
        seen.add(path.resolve())
    return found


def _in_folder(folder: Path) -> list[Path]:
    inside = list(folder.iterdir())
    scenes = sorted(path for path in inside if path.is_dir() and holds_pictures(path))
    if scenes and not holds_pictures(folder):
        named = ", ".join(path.name for path in scenes[:LISTED])
        more = f" and {len(scenes) - LISTED} more" if len(scenes) > LISTED else ""
        raise InputError(
            f"{folder}: expected the photos of one scene, got {len(scenes)} folders of photos "
            f"({named}{more}). Give one of them: {scenes[0]}"
        )
    return _choose(folder, inside)


def _choose(where: str | Path, files: Sequence[Path]) -> list[Path]:
    chosen, left_out = choose_pictures(files)
    if not chosen:
        told = describe_left_out(left_out) or "it is empty"
        raise NotFoundError(f"{where}: holds no picture that can be read ({told}).")
    warn_left_out(where, left_out)
    return chosen


def is_video(path: Path) -> bool:
    """Whether a name ends like a video's."""
    return path.suffix.lower() in VIDEOS


def read_video(path: Path, every: int, folder: Path) -> list[Path]:
    """Write every n-th frame of a video as a PNG.

    Args:
        path: The video.
        every: 1 takes all frames, 10 the first, the eleventh, ...
        folder: Where they go.

    Returns:
        The files, in their order.

    Raises:
        NotFoundError: If there is no such file.
        UnsupportedError: If PyAV, which reads videos, is not installed.
        InputError: If it can't be read.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file. Check the path.")
    if importlib.util.find_spec("av") is None:
        raise UnsupportedError(
            f"{path}: reading a video takes PyAV, which is not installed: pip install av"
        )
    import av

    files: list[Path] = []
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index % every == 0:
                    file = folder / f"{path.stem}-{index:06d}.png"
                    frame.to_image().save(file)
                    files.append(file)
    except (av.FFmpegError, IndexError) as error:
        raise InputError(
            f"{path}: expected a video, got a file of which no pictures can be read. Check the "
            "file, or convert it to MP4."
        ) from error
    logger.info("%s: %d frames", path, len(files))
    return files
