"""Real and drawn inputs that are at hand on every machine: documents and pictures."""

from __future__ import annotations

import ast
import importlib.metadata
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

OURS = "retrofit-attention"  # its page changes with every version, and numbers should not


def collect_documents(
    is_long_enough: Callable[[str], bool], wanted: int, *, passage: int = 3000, seed: int = 0
) -> list[tuple[str, str]]:
    """Prose that ships with Python and with the packages installed beside it.

    Python's help topics, the docstrings of its modules and the descriptions of installed packages;
    where these are too few, further passages of the long ones.

    Args:
        is_long_enough: Whether a text is taken (by its tokens, say).
        wanted: How many to return.
        passage: Characters at which a text is cut; 3000 are some 600 tokens of English.
        seed: Of their choice and order.

    Returns:
        `(name, text)` for each, all texts different.

    Raises:
        InputError: If there are not that many.
    """
    sources = list(_sources())
    random.Random(seed).shuffle(sources)
    longest = max(len(text) for _, text in sources)
    found: dict[str, str] = {}
    for start in range(0, longest, passage):
        for name, text in sources:
            piece = text[start : start + passage].strip()
            if piece and piece not in found and is_long_enough(piece):
                found[piece] = f"{name}, from {start}" if start else name
            if len(found) == wanted:
                return [(name, text) for text, name in found.items()]
    raise InputError(
        f"documents: expected {wanted} long ones in this Python and its packages, got "
        f"{len(found)}. Give your own with --inputs."
    )


def _sources() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield f"help({topic!r})", text
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_bytes()))
        if docstring:
            yield f"docstring of {file.stem}", docstring
    descriptions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        _, _, body = (distribution.read_text("METADATA") or "").partition("\n\n")
        if body and distribution.name != OURS:
            descriptions[distribution.name] = body
    for name, body in sorted(descriptions.items()):
        yield f"description of {name}", body


def draw_pictures(count: int, width: int, height: int, *, seed: int = 0) -> list[Image]:
    """Scenes of overlapping shapes on a sky and a ground, with shading and grain.

    Args:
        count: How many.
        width: Pixels.
        height: Pixels.
        seed: Of everything in them.
    """
    generator = random.Random(seed)
    return [_draw_scene(generator, width, height) for _ in range(count)]


def _draw_scene(generator: random.Random, width: int, height: int) -> Image:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    def color() -> tuple[int, int, int]:
        return generator.randrange(256), generator.randrange(256), generator.randrange(256)

    horizon = generator.uniform(0.4, 0.7) * height
    rows = np.arange(height, dtype=np.float32)[:, None, None]
    blend = np.clip(rows / horizon, 0, 1)
    sky = (1 - blend) * np.array(color()) + blend * np.array(color())
    scene = np.where(rows < horizon, sky, np.array(color()))
    picture = Image.fromarray(np.broadcast_to(scene, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(generator.randrange(4, 12)):
        size = generator.uniform(0.08, 0.4) * min(width, height)
        x, y = generator.uniform(0, width), generator.uniform(0.3, 1) * height
        box = [x - size / 2, y - size / 2, x + size / 2, y + size / 2]
        shape = generator.choice(("ellipse", "rectangle", "polygon"))
        if shape == "polygon":
            sides = generator.randrange(3, 7)
            turn = generator.randrange(360)
            draw.regular_polygon((x, y, size / 2), sides, rotation=turn, fill=color())
        else:
            getattr(draw, shape)(box, fill=color(), outline=color())
    picture = picture.filter(ImageFilter.GaussianBlur(max(width, height) / 400))
    grain = np.random.default_rng(generator.randrange(2**32)).normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
