"""Sizes of pictures that a network can take, and the nearest ones to a size that it can't."""

from __future__ import annotations

from retrofit.runtime.errors import InputError


def refuse_off_grid(width: int, height: int, multiple: int) -> None:
    """Refuse a size that its network's latents or patches do not fill.

    Args:
        width: Pixels.
        height: Pixels.
        multiple: Pixels that both must be a multiple of.

    Raises:
        InputError: If one is not; the message names the nearest sizes.
    """
    wrong = [side for side in (width, height) if side % multiple]
    if not wrong:
        return
    smaller = [max(multiple, side // multiple * multiple) for side in (width, height)]
    larger = [-(-side // multiple) * multiple for side in (width, height)]
    sizes = dict.fromkeys(f"{sides[0]}x{sides[1]}" for sides in (smaller, larger))
    nearest = "The nearest is" if len(sizes) == 1 else "The nearest are"
    raise InputError(
        f"--size {width}x{height}: expected multiples of {multiple} pixels, "
        f"got {' and '.join(map(str, dict.fromkeys(wrong)))}. {nearest} {' and '.join(sizes)}."
    )
