"""Checkpoints that come with retrofit's source, by the name they have wherever a MODEL is taken."""

from __future__ import annotations

from pathlib import Path

from retrofit.runtime.errors import NotFoundError

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = {
    "rooms": ROOT / "examples" / "rooms" / "model",
    "shapes": ROOT / "examples" / "shapes" / "model",
}


def resolve_bundled(model: str | Path) -> str | Path:
    """The folder of a bundled checkpoint, or what was given if it is no such name.

    A bundled name goes before a folder of that name; write `./shapes` for the folder.

    Raises:
        NotFoundError: If this retrofit was installed without it.
    """
    folder = BUNDLED.get(model) if isinstance(model, str) else None
    if folder is None:
        return model
    if not folder.is_dir():
        raise NotFoundError(
            f"{model}: this bundled model comes with retrofit's source "
            f"({folder.relative_to(ROOT)}), not with the installed package. Give the path of that "
            f"folder in a checkout, or install from one: pip install -e . "
            f"For a folder of your own write ./{model}."
        )
    return folder
