"""What a comparison runs: documents, pictures, or latents over a short schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.checkpoints import Checkpoint, read_json
from retrofit.checkpoints.libraries import open_tokenizer
from retrofit.evaluate.measure import ModelCall, ModelInput
from retrofit.evaluate.samples import collect_documents, draw_pictures
from retrofit.evaluate.scenes import NamedScene, read_scenes
from retrofit.families.examples import InputSize
from retrofit.patching.networks import FoundNetwork, find_networks
from retrofit.profiling.inspection import AskedSize
from retrofit.reconstruct.fitting import Fitting
from retrofit.runtime.errors import InputError, NotFoundError, UnsupportedError
from retrofit.runtime.pictures import (
    LeftOut,
    choose_pictures,
    describe_left_out,
    read_photo,
    warn_left_out,
)
from retrofit.runtime.reading import read_text

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
TEXTS = (".md", ".rst", ".txt")
DEFAULT_COUNT = {"texts": 8, "pictures": 4, "drawn": 2}
LONG_ENOUGH = 0.8  # of the tokens that a document is cut at
PASSAGE = 6  # characters a token, so that a passage has enough of them
STEPS = 4  # of the schedule that a denoising network runs through


@dataclass(frozen=True, kw_only=True)
class InputChoice:
    """What the user said about inputs.

    Attributes:
        files: Texts or pictures, or folders of them; empty takes what is at hand.
        count: How many inputs; None takes a few.
        asked: Size in pixels, frames and tokens; None takes what the networks were trained at.
        sizes: The same by network, in its units; others take what they were trained at.
        seed: Of everything drawn.
    """

    files: tuple[Path, ...] = ()
    count: int | None = None
    asked: AskedSize = field(default_factory=AskedSize)
    sizes: Mapping[str, InputSize] = field(default_factory=dict)
    seed: int = 0


def make_inputs(
    target: Any,
    choice: InputChoice,
    *,
    folder: Path | None = None,
    components: tuple[str, ...] = (),
) -> list[ModelInput]:
    """Inputs for every network of a target that a patch would change.

    Args:
        target: An `nn.Module` or a pipeline.
        choice: What the user said.
        folder: Where a tokenizer or the settings of an image processor lie.
        components: Networks of a pipeline; empty takes the denoising ones.

    Raises:
        UnsupportedError: If a network's family can't make inputs, or takes no files.
        NotFoundError: If a file does not exist.
    """
    found = find_networks(target, components)
    return [item for network in found for item in _network_inputs(network, choice, folder)]


def scene_inputs(checkpoint: Checkpoint, choice: InputChoice) -> list[ModelInput]:
    """Scenes of the folders that the user named, for a VGGT or Pi3 with its heads.

    Raises:
        InputError: If one can't be used, or its photos do not become of the size asked for.
    """
    asked = choice.asked
    fitting = Fitting.of(checkpoint, size=asked.width)
    if asked.width is not None and asked.height is not None:
        fitting = replace(fitting, max_pixels=asked.width * asked.height)
    scenes = read_scenes(choice.files, fitting, views=asked.frames, count=choice.count)
    _refuse_other_sizes(scenes, asked, fitting)
    return [
        ModelInput(
            name=scene.name,
            calls=(ModelCall(arguments={"images": scene.images[None]}),),
            whole=True,
            truth=scene.truth,
        )
        for scene in scenes
    ]


def _refuse_other_sizes(scenes: Sequence[NamedScene], asked: AskedSize, fitting: Fitting) -> None:
    """Photos keep their shape: with a width their height is given, to a patch where areas are."""
    if asked.width is None or asked.height is None:
        return
    off = fitting.patch_size if fitting.mode == "area" else 0
    made = {scene.name: (scene.images.shape[3], scene.images.shape[2]) for scene in scenes}
    for name, (width, height) in made.items():
        if max(abs(width - asked.width), abs(height - asked.height)) > off:
            one = len(set(made.values())) == 1
            fix = f"Take --size {width}x{height}" if one else "Compare scenes of one shape"
            raise InputError(
                f"--size {asked.width}x{asked.height}: the photos of {name} keep their shape and "
                f"become {width}x{height}. {fix}, or leave it out."
            )


def scene_size(inputs: Sequence[ModelInput]) -> AskedSize:
    """Views and pixels of the largest scene."""
    shapes = [item.calls[0].arguments["images"].shape for item in inputs]
    _, frames, _, height, width = max(shapes, key=math.prod)
    return AskedSize(width=width, height=height, frames=frames)


def _network_inputs(
    network: FoundNetwork, choice: InputChoice, folder: Path | None
) -> list[ModelInput]:
    examples = network.family.inputs
    if examples is None:
        raise UnsupportedError(
            f"{network.where('')}: family {network.family.name!r} can't make inputs. Compare in "
            "Python with `retrofit.evaluate.compare_models` and inputs of your own."
        )
    size = choice.sizes.get(network.name) or examples.native(network.module)
    drawn = examples.make(network.module, size, torch.Generator().manual_seed(choice.seed))
    if examples.files == "texts" and (choice.files or _has_tokenizer(folder)):
        return _texts(network, choice, folder, size)
    if examples.files == "pictures":
        return _pictures(network, choice, folder, drawn)
    if choice.files:
        raise UnsupportedError(
            f"{network.where('')}: takes no --inputs, they are drawn from the seed. Leave it out."
        )
    if examples.files == "texts":
        logger.warning("no tokenizer beside the model: random tokens say little about quality")
    return _drawn(network, choice, size)


def _texts(
    network: FoundNetwork, choice: InputChoice, folder: Path | None, size: InputSize
) -> list[ModelInput]:
    """Documents as the tokenizer cuts them at `size.tokens`; shorter than that only if given."""
    if folder is None or not _has_tokenizer(folder):
        raise NotFoundError(
            f"{folder or network.where('')}: expected a tokenizer beside the model, got none. "
            "Leave --inputs out to compare on random tokens."
        )
    tokenizer = open_tokenizer(folder)

    def encode(text: str) -> dict[str, Tensor]:
        encoded = tokenizer(text, truncation=True, max_length=size.tokens, return_tensors="pt")
        return dict(encoded)

    def is_long_enough(text: str) -> bool:
        return encode(text)["input_ids"].shape[1] >= LONG_ENOUGH * size.tokens

    count = choice.count or DEFAULT_COUNT["texts"]
    if choice.files:
        files = _files(choice.files, _choose_texts)[: choice.count]
        named = [(file.name, _read_text(file)) for file in files]
    else:
        named = collect_documents(
            is_long_enough, count, passage=PASSAGE * size.tokens, seed=choice.seed
        )
    return [_one_call(network, name, encode(text)) for name, text in named]


def _read_text(file: Path) -> str:
    try:
        text = read_text(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected a text in UTF-8, got something else.") from error
    if not text.strip():
        raise InputError(f"{file}: expected a text, got an empty file. Leave it out of --inputs.")
    return text


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and (folder / "tokenizer_config.json").is_file()


def _pictures(
    network: FoundNetwork, choice: InputChoice, folder: Path | None, drawn: dict[str, Any]
) -> list[ModelInput]:
    """Pictures, the user's or drawn ones, as the checkpoint's processor normalises them."""
    height, width = drawn["pixel_values"].shape[-2:]
    count = choice.count or DEFAULT_COUNT["pictures"]
    if choice.files:
        files = _files(choice.files, choose_pictures)[: choice.count]
        named = [(file.name, read_photo(file).over("white")) for file in files]
    else:
        scenes = draw_pictures(count, width, height, seed=choice.seed)
        named = [(f"scene {i}", scene) for i, scene in enumerate(scenes)]
    normalise = _normaliser(folder)
    return [
        _one_call(
            network, name, {**drawn, "pixel_values": normalise(picture.resize((width, height)))}
        )
        for name, picture in named
    ]


def _normaliser(folder: Path | None) -> Callable[[Image], Tensor]:
    """Turns a picture into `[1, 3, H, W]` with the checkpoint's mean and deviation."""
    import numpy as np

    file = None if folder is None else folder / "preprocessor_config.json"
    settings = read_json(file) if file is not None and file.is_file() else {}
    mean = torch.tensor(settings.get("image_mean") or [0.5] * 3).view(1, 3, 1, 1)
    deviation = torch.tensor(settings.get("image_std") or [0.5] * 3).view(1, 3, 1, 1)

    def normalise(picture: Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
        return (pixels.permute(2, 0, 1)[None] - mean) / deviation

    return normalise


def _drawn(network: FoundNetwork, choice: InputChoice, size: InputSize) -> list[ModelInput]:
    """The family's own seeded inputs; a denoising network runs through a short schedule."""
    examples = network.family.inputs
    assert examples is not None  # noqa: S101 - `_network_inputs` has looked
    inputs = []
    for i in range(choice.count or DEFAULT_COUNT["drawn"]):
        generator = torch.Generator().manual_seed(choice.seed + i)
        arguments = examples.make(network.module, size, generator)
        name = f"{size}, seed {choice.seed + i}"
        if network.family.denoises:
            first = examples.first_timestep
            calls = tuple(_at_step(arguments, first, step) for step in range(STEPS))
            inputs.append(ModelInput(name=name, calls=calls, network=network.name))
        else:
            inputs.append(_one_call(network, name, arguments))
    return inputs


def _at_step(arguments: dict[str, Any], first: float, step: int) -> ModelCall:
    timestep = arguments["timestep"]
    value = first * (1 - step / STEPS)
    value = value if timestep.is_floating_point() else round(value)
    arguments = {**arguments, "timestep": torch.full_like(timestep, value)}
    return ModelCall(arguments=arguments, step=(step, STEPS))


def _one_call(network: FoundNetwork, name: str, arguments: dict[str, Any]) -> ModelInput:
    ids = arguments.get("input_ids")
    return ModelInput(
        name=name,
        calls=(ModelCall(arguments=arguments),),
        network=network.name,
        tokens=None if ids is None else int(ids.shape[1]),
    )


def _files(
    paths: Sequence[Path], choose: Callable[[Iterable[Path]], tuple[list[Path], LeftOut]]
) -> list[Path]:
    """Files themselves, and those in folders that can be used; a warning names the others."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"{path}: no such file or folder. Check --inputs.")
        if not path.is_dir():
            files.append(path)
            continue
        chosen, left_out = choose(path.iterdir())
        if not chosen:
            told = describe_left_out(left_out) or "it is empty"
            raise NotFoundError(f"{path}: holds no file that can be used ({told}).")
        warn_left_out(path, left_out)
        files += chosen
    return files


def _choose_texts(files: Iterable[Path]) -> tuple[list[Path], LeftOut]:
    seen = sorted(file for file in files if file.is_file() and not file.name.startswith("."))
    others = [file.name for file in seen if file.suffix.lower() not in TEXTS]
    left_out = {f"ends in none of {', '.join(TEXTS)}": others} if others else {}
    return [file for file in seen if file.suffix.lower() in TEXTS], left_out
