"""What is fine-tuned: the loaded checkpoint, its patch, and the rows it learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retrofit.artifact.planning import Plan, plan_patch
from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.libraries import open_tokenizer
from retrofit.checkpoints.opening import load_networks, load_whole
from retrofit.families.training import Training
from retrofit.methods import Method
from retrofit.patching.networks import FoundNetwork, find_networks
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe, default_recipe
from retrofit.profiling.inspection import AskedSize, network_size
from retrofit.runtime.errors import AlreadyPatchedError, InputError, NotFoundError, UnsupportedError
from retrofit.training.request import FinetuneRequest
from retrofit.training.rows import Dataset, Rows, encode_all, split
from retrofit.training.samples import (
    DEFAULT_SAMPLES,
    Captioned,
    cut_into_passages,
    find_captioned,
    find_texts,
    picture_size,
    read_picture,
    read_prompts,
)

LONGEST = 512  # tokens
CHARACTERS = 5  # of English in a token, rather more than fewer
MULTIPLE = 64  # pixels that sides of buckets are multiples of
RATIOS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint made ready.

    Attributes:
        plan: Of its patched copy.
        target: The pipeline or network, in float32.
        network: The patched network that learns.
        handle: Its patch.
        training: How its family is trained.
        owner: What the family's functions are called with: the pipeline, or the tokenizer.
    """

    plan: Plan
    target: Any
    network: FoundNetwork
    handle: Patch
    training: Training
    owner: Any


def plan_finetune(
    checkpoint: Checkpoint,
    what: Recipe | Method | str | None,
    request: FinetuneRequest,
    *,
    trust_remote_code: bool = False,
    **parameters: Any,
) -> Plan:
    """Work out, on configs alone, what is patched and whether it can learn.

    Args:
        checkpoint: A source, or one that `retrofit patch` wrote.
        what: The method or recipe for a source; None for a patched one.
        request: What is asked.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        parameters: Settings of the method.

    Raises:
        InputError: If there is nothing to train, or it can't be trained.
    """
    manifest = checkpoint.manifest
    if manifest is not None:
        if what is not None:
            raise AlreadyPatchedError(
                f"{checkpoint.name}: already patched. Leave --method out, or give its source "
                f"({manifest.source})."
            )
        if manifest.tuned is not None:
            raise InputError(
                f"{checkpoint.name}: already fine-tuned, and the dense model it came from is not "
                f"in it. Give its source ({manifest.source}) with --method."
            )
        what = Recipe.from_dict(manifest.recipe)
        if len(what.rules) == 1:  # what is usual for its method is no part of the record
            usual = default_recipe(what.method.name, manifest.family[0])
            what = replace(what, finetune=usual.finetune)
        checkpoint = replace(checkpoint, manifest=None)
    if what is None:
        raise InputError(f"{checkpoint.name}: not patched. Add --method or --recipe.")
    if checkpoint.file is not None and request.train != "gates":
        raise UnsupportedError(
            f"{checkpoint.name}: expected a folder, got a single file, whose weights are not "
            "written anew. Write a folder first: DiffusionPipeline.from_single_file(FILE)"
            ".save_pretrained(FOLDER)."
        )
    plan = plan_patch(checkpoint, what, trust_remote_code=trust_remote_code, **parameters)
    _refuse(plan, request)
    return plan


def open_source(
    plan: Plan, request: FinetuneRequest, *, device: str, trust_remote_code: bool = False
) -> Source:
    """Load what a plan is for, in float32, with the patch in it."""
    checkpoint, options = plan.checkpoint, {"device": device, "dtype": "float32"}
    is_pipeline = checkpoint.pipeline_class is not None
    if is_pipeline:
        target = load_whole(checkpoint, trust_remote_code=trust_remote_code, **options)
        target.set_progress_bar_config(disable=True)
        owner = target
    else:
        target = load_networks(checkpoint, [""], trust_remote_code=trust_remote_code, **options)
        if not (checkpoint.root / "tokenizer_config.json").is_file():
            raise NotFoundError(f"{checkpoint.name}: expected a tokenizer beside it, got none.")
        owner = open_tokenizer(checkpoint.root)
    handle = patch(target, plan.recipe)
    network = find_networks(target, plan.recipe.components)[0]
    assert network.family.training is not None  # noqa: S101 - `plan_finetune` has looked
    return Source(
        plan=plan,
        target=target,
        network=network,
        handle=handle,
        training=network.family.training,
        owner=owner,
    )


def read_dataset(
    source: Source, request: FinetuneRequest, cache: Path, advance: Advance
) -> Dataset:
    """Encode the user's samples, or let the dense model make them.

    Raises:
        InputError: If there are too few.
    """
    if source.training.data == "texts":
        buckets = [_text_rows(source, request, cache, advance)]
    elif request.data == "self":
        buckets = [_own_rows(source, request, cache, advance)]
    else:
        buckets = _picture_rows(source, request, cache, advance)
    return split(buckets, request.held_out, request.batch)


def _refuse(plan: Plan, request: FinetuneRequest) -> None:
    """Refuse what can't be trained, by name."""
    networks = [network for network, _ in plan.handle.networks]
    if len(networks) > 1:
        names = ", ".join(network.where("") for network in networks)
        raise UnsupportedError(
            f"{plan.checkpoint.name}: expected one network to train, got {names}. Patch one with "
            "a recipe that names it (components:)."
        )
    family = networks[0].family
    training = family.training
    if training is None:
        from retrofit.families import FAMILIES

        known = ", ".join(name for name, other in FAMILIES.items() if other.training is not None)
        raise UnsupportedError(
            f"{plan.checkpoint.name}: family {family.name} can't be fine-tuned yet. Families that "
            f"can: {known}."
        )
    if request.size is not None:
        width, height = request.size
        network_size(plan.checkpoint, networks[0], AskedSize(width=width, height=height))
    needs_pipeline = training.data == "captioned pictures"
    if needs_pipeline and plan.checkpoint.pipeline_class is None:
        raise UnsupportedError(
            f"{plan.checkpoint.name}: expected a pipeline, whose autoencoder and text encoders are "
            "needed, got one network. Give the folder with model_index.json."
        )
    for rule in plan.recipe.rules:
        if rule.method.needs_steps or rule.steps:
            raise UnsupportedError(
                f"{rule.method.name}: depends on the step of a denoising run, and a training batch "
                "mixes them. Take a method or a recipe that is the same at every step."
            )
    _refuse_request(plan, request, family.name, training)


def _refuse_request(plan: Plan, request: FinetuneRequest, family: str, training: Training) -> None:
    """Refuse settings that a family or a method does not have."""
    if request.train == "gates" and not all(r.method.can_train_gates for r in plan.recipe.rules):
        raise InputError(
            f"--train gates: {plan.recipe.methods} has no gates or tables to learn. Take --train "
            "all, attention or lora."
        )
    if request.objective == "denoise" and not training.has_own_loss:
        raise InputError(
            f"--objective denoise: family {family} has no loss of its own here. Take distill."
        )
    if request.validation_prompts is not None and training.show is None:
        raise InputError(f"--validation-prompts: family {family} draws no pictures. Leave it out.")
    if request.data == "self" and training.sample is None:
        raise InputError(
            f"--data self: family {family} makes no samples. Give a folder of {training.data}."
        )


def _own_rows(source: Source, request: FinetuneRequest, cache: Path, advance: Advance) -> Rows:
    prompts = read_prompts(request.prompts)
    count = request.samples or DEFAULT_SAMPLES
    captions = [prompts[i % len(prompts)] for i in range(count)]
    width, height = _native_size(source) if request.size is None else request.size
    sample = source.training.sample
    assert sample is not None  # noqa: S101 - `_refuse` has looked

    def encode(part: range) -> Rows:
        with source.handle.disabled():
            return sample(
                source.owner, [captions[i] for i in part], (height, width), request.seed + part[0]
            )

    key = [_identity(source), "self", captions, width, height, request.seed]
    return encode_all(
        count, encode, cache=cache, key=key, advance=advance, what="samples of the dense model"
    )


def _picture_rows(
    source: Source, request: FinetuneRequest, cache: Path, advance: Advance
) -> list[Rows]:
    found = find_captioned(request.data)[: request.samples]
    buckets: dict[tuple[int, int], list[Captioned]] = {}
    native = _native_size(source)
    for item in found:
        size = request.size or _bucket(item, native)
        buckets.setdefault(size, []).append(item)
    rows: list[Rows] = []
    for size, items in sorted(buckets.items()):
        key = [
            _identity(source),
            size,
            [
                (str(i.file), i.file.stat().st_size, i.file.stat().st_mtime_ns, i.caption)
                for i in items
            ],
        ]

        def encode(part: range, items: list[Captioned] = items, size: Any = size) -> Rows:
            pictures = torch.stack([read_picture(items[i].file, size) for i in part])
            captions = [items[i].caption for i in part]
            return source.training.encode(source.owner, pictures, captions)

        what = f"encoding {size[0]}x{size[1]}"
        rows.append(
            encode_all(len(items), encode, cache=cache, key=key, advance=advance, what=what)
        )
    return rows


def _bucket(item: Captioned, native: tuple[int, int]) -> tuple[int, int]:
    """The size of the training area whose shape is nearest to a picture's."""
    width, height = picture_size(item.file)
    ratio = width / height
    nearest = min(RATIOS, key=lambda known: abs(known - ratio))
    area = native[0] * native[1]
    width = round((area * nearest) ** 0.5 / MULTIPLE) * MULTIPLE
    height = round((area / nearest) ** 0.5 / MULTIPLE) * MULTIPLE
    return (max(width, MULTIPLE), max(height, MULTIPLE)) if nearest != 1 else native


def _text_rows(source: Source, request: FinetuneRequest, cache: Path, advance: Advance) -> Rows:
    examples = source.network.family.inputs
    assert examples is not None  # noqa: S101 - families that learn have inputs
    limit = examples.native(source.network.module).tokens
    length = min(request.tokens or LONGEST, limit)
    passages = cut_into_passages(find_texts(request.data), CHARACTERS * length, request.seed)
    passages = passages[: request.samples]

    def encode(part: range) -> Rows:
        return source.training.encode(source.owner, [passages[i] for i in part], length)

    key = [_identity(source), length, passages]
    return encode_all(
        len(passages), encode, cache=cache, key=key, advance=advance, what="reading texts"
    )


def _native_size(source: Source) -> tuple[int, int]:
    """Width and height of the training size in pixels."""
    examples = source.network.family.inputs
    assert examples is not None  # noqa: S101 - families that learn have inputs
    size = examples.native(source.network.module)
    scale = getattr(source.owner, "vae_scale_factor", examples.latent_scale[1])
    return size.width * scale, size.height * scale


def _identity(source: Source) -> dict[str, Any]:
    """What of a checkpoint its rows depend on."""
    files = source.plan.states
    return {path: str(state) for path, state in sorted(files.items())}
