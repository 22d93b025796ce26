"""What is to be generated: everything that decides a picture's pixels, as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from retrofit.checkpoints.record_types import SavedRecipe
from retrofit.runtime.errors import ConfigError, InputError, NotFoundError
from retrofit.runtime.reading import PICTURE_BYTES, read_bytes
from retrofit.runtime.schema import OTHER_KEYS, Sha256, Within, find_problems
from retrofit.sampling.request_rules import rules_of

Offload = Literal["none", "model", "sequential"]
MOST_PICTURES = 10_000
MOST_PIXELS = 65_536  # of a side
MOST_STEPS = 10_000
MOST_THREADS = 4096
PICTURES_IN = ("image", "mask", "control_image", "ip_image")
UNRECORDED = "trust_remote_code"  # permission to run code is the user's, never a file's


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A picture that goes in.

    Attributes:
        path: Where it lies.
        sha256: Of its bytes, so that another file in its place is noticed.
    """

    path: str
    sha256: Sha256

    @classmethod
    def read(cls, path: str | Path, what: str) -> InputFile:
        """Look at a file.

        Args:
            path: Where it lies.
            what: The option that names it, for messages.

        Raises:
            NotFoundError: If it does not exist.
            InputError: If it is no picture, or can't be read.
        """
        from retrofit.runtime.pictures import read_photo

        file = Path(path).expanduser()
        try:
            data = read_bytes(file, PICTURE_BYTES)
        except OSError as error:
            raise NotFoundError(
                f"{what} {path}: can't be read ({error.strerror}). Give a PNG or JPEG."
            ) from error
        read_photo(path, what=what, data=data)
        return cls(path=str(path), sha256=hashlib.sha256(data).hexdigest())

    def check(self, what: str) -> None:
        """Compare the file with the record.

        Raises:
            InputError: If it is another one now.
        """
        if InputFile.read(self.path, what).sha256 != self.sha256:
            raise InputError(
                f"{what} {self.path}: not the file that the picture was made with. "
                f"Name the new one with {what}, or put the old one back."
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """Pictures to be made; what is None is left to the checkpoint and its pipeline.

    Attributes:
        model: A checkpoint: a folder, a hub id, a single file or a bundled name.
        config: For a single file: folder or hub id with its configs.
        prompts: One for each picture.
        seeds: One for each picture.
        batch: Pictures made in one call.
        negative: Negative prompt.
        width: Pixels.
        height: Pixels.
        steps: Denoising steps.
        guidance: Guidance scale.
        eta: Noise that DDIM adds at every step, 0 to 1.
        scheduler: Class name of a diffusers scheduler.
        recipe: What to patch with, as `Recipe.to_dict`; None is dense, or the checkpoint's own.
        loras: Path or hub id, and weight.
        image: Where image-to-image and inpainting start.
        mask: White where inpainting paints.
        strength: How much of `image` is painted over, 0 to 1.
        controlnet: A ControlNet checkpoint.
        control_image: What it looks at.
        control_scale: Its weight.
        ip_adapter: A folder, hub id or file with IP-Adapter weights.
        ip_image: What it looks at.
        ip_scale: Its weight.
        dtype: Of the weights.
        device: Where it runs.
        offload: Whether networks wait on the CPU (`model`), or even their layers (`sequential`).
        vae_tiling: Whether pictures are decoded in tiles.
        threads: Of the CPU; sums come out differently with another number.
        trust_remote_code: Whether code that comes with the checkpoint may run; neither written into
            a picture nor read from one.
    """

    model: str
    config: str = ""
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    batch: Annotated[int, Within(1, MOST_PICTURES)] = 1
    negative: str | None = None
    width: Annotated[int, Within(1, MOST_PIXELS)] | None = None
    height: Annotated[int, Within(1, MOST_PIXELS)] | None = None
    steps: Annotated[int, Within(1, MOST_STEPS)] | None = None
    guidance: float | None = None
    eta: float | None = None
    scheduler: str | None = None
    recipe: Mapping[str, Any] | None = None
    loras: tuple[tuple[str, float], ...] = ()
    image: InputFile | None = None
    mask: InputFile | None = None
    strength: float | None = None
    controlnet: str | None = None
    control_image: InputFile | None = None
    control_scale: float | None = None
    ip_adapter: str | None = None
    ip_image: InputFile | None = None
    ip_scale: float | None = None
    dtype: str | None = None
    device: str | None = None
    offload: Offload = "none"
    vae_tiling: bool = False
    threads: Annotated[int, Within(1, MOST_THREADS)] | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Look for mistakes that show without the checkpoint.

        Raises:
            ConfigError: With every mistake at once.
        """
        problems = self.find_mistakes()
        if problems:
            raise ConfigError(" ".join(problems))

    def find_mistakes(self) -> list[str]:
        """Every mistake that shows without the checkpoint."""
        return [text for is_wrong, text in rules_of(self) if is_wrong]

    def only(self, places: Sequence[int]) -> Request:
        """The same for some of the pictures."""
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in places),
            seeds=tuple(self.seeds[i] for i in places),
            batch=len(places),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data: what a PNG holds."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        del data[UNRECORDED]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> Request:
        """From plain data; whether it trusts remote code is dropped.

        Raises:
            InputError: If it is not what `to_dict` gives.
        """
        data = {key: value for key, value in data.items() if key != UNRECORDED}
        unknown = sorted(set(data) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            named = ", ".join(name if name.isidentifier() else ascii(name) for name in unknown)
            raise InputError(
                f"{where}: its record has settings that this retrofit does not know ({named}). "
                "Upgrade: pip install --upgrade retrofit-attention"
            )
        saved = Annotated[SavedRecipe, OTHER_KEYS] | None
        problems = find_problems(data, cls) or find_problems(data.get("recipe"), saved, "recipe")
        if not problems:
            request = cls(**_as_values(data))
            problems = request.find_mistakes()
            if not problems:
                _check_recipe(request, where)
                return request
        raise InputError(
            f"{where}: its record of settings can't be read ({'; '.join(problems)}). Give another "
            "picture, or the retrofit that made it."
        )

    def check_files(self) -> None:
        """Compare the pictures that go in with the record.

        Raises:
            InputError: If one is missing or another one now.
        """
        for option, file in self.files().items():
            file.check(option)

    def files(self) -> dict[str, InputFile]:
        """The pictures that go in, by the option that names them."""
        found = {name: getattr(self, name) for name in PICTURES_IN}
        return {
            f"--{name.replace('_', '-')}": file for name, file in found.items() if file is not None
        }


def _check_recipe(request: Request, where: str) -> None:
    from retrofit.patching.recipe import Recipe

    if request.recipe is not None:
        Recipe.from_dict(request.recipe, f"{where}: recipe")


def _as_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Checked plain data as the fields of a request."""
    values = dict(data)
    for key in PICTURES_IN:
        if values.get(key) is not None:
            values[key] = InputFile(**values[key])
    for key in ("prompts", "seeds"):
        values[key] = tuple(values.get(key, ()))
    values["loras"] = tuple((path, weight) for path, weight in values.get("loras", ()))
    return values
