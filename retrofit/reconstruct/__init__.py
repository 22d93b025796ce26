"""Cameras, depth and a point cloud from photos, with VGGT or Pi3, dense or patched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.architectures.images import FitMode, ImageFit
from retrofit.architectures.recognition import network_class
from retrofit.architectures.vggt import head_dtype
from retrofit.checkpoints import Checkpoint, find_checkpoint
from retrofit.checkpoints.libraries import torch_dtype
from retrofit.checkpoints.opening import load_networks
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe
from retrofit.reconstruct.fitting import Fitting, running_dtype, stored_dtype
from retrofit.reconstruct.memory import MemoryModel
from retrofit.reconstruct.scene import Scene, to_scene
from retrofit.runtime.devices import on_accelerator
from retrofit.runtime.errors import InputError, RetrofitError, UnsupportedError
from retrofit.runtime.intercept import find_interceptor
from retrofit.runtime.memory import memory_info
from retrofit.runtime.timing import timed

Progress = Callable[[str, int, int], None]
HEADS = ("camera_head.", "point_head.", "depth_head.", "conf_head.", "image_")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a scene is reconstructed.

    Attributes:
        fit: How photos are fitted, as in `load_images`; None takes the network's own way.
        size: Pixels, as in `load_images`; None takes what the network was trained at.
        device: Where it runs.
        dtype: Of the weights; None keeps the checkpoint's own, but float32 for half precisions on
            a CPU, which computes in them slowly.
        offload: Keep the layers between trunk and heads, and the results, in main memory.
        frames_per_chunk: Views that the heads work on at a time.
        config: For a single file: folder or hub id with its config.
    """

    fit: FitMode | None = None
    size: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    offload: bool = False
    frames_per_chunk: int = 8
    config: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A scene and what it took.

    Attributes:
        scene: Cameras, depth, points.
        network: `VGGT` or `Pi3`.
        patch: What was patched, and what of the work was kept; None for dense.
        seconds: Of the forward pass.
        predicted_bytes: Peak memory that was predicted before it ran.
    """

    scene: Scene
    network: str
    patch: Patch | None
    seconds: float
    predicted_bytes: int


class Reconstructor:
    """A checkpoint's network, made ready for scenes.

    Example:
        ```py
        network = Reconstructor("facebook/VGGT-1B", "block-sparse", keep=0.5)
        result = network.run(["a.jpg", "b.jpg", "c.jpg"])
        result.scene.points  # [N, H, W, 3]
        ```
    """

    def __init__(
        self,
        model: str | Path,
        what: Recipe | str | None = None,
        *,
        settings: Settings | None = None,
        sites: Sequence[str] = (),
        **parameters: Any,
    ) -> None:
        """Find the checkpoint; no weights are read yet.

        Args:
            model: A VGGT or Pi3 checkpoint; one that is patched runs patched.
            what: A method or recipe to patch in memory; None leaves the checkpoint as it is.
            settings: How to run it.
            sites: Globs instead of the recipe's own.
            **parameters: Settings of the method.

        Raises:
            UnsupportedError: If the checkpoint holds neither network.
        """
        self.settings = settings or Settings()
        self.checkpoint = find_checkpoint(model, config=self.settings.config)
        self.name = _require_network(self.checkpoint)
        self.what = self._recorded_recipe() if what is None else what
        self.sites, self.parameters = tuple(sites), parameters
        self._model: nn.Module | None = None
        self._patch: Patch | None = None

    def _recorded_recipe(self) -> Recipe | None:
        manifest = self.checkpoint.manifest
        if manifest is not None:
            manifest.check_files(self.checkpoint.root)
        return None if manifest is None else Recipe.from_dict(manifest.recipe, self.checkpoint.name)

    def read_images(self, files: Sequence[Path]) -> tuple[Tensor, list[ImageFit]]:
        """Photos `[N, 3, H, W]` as the network takes them, and how they were fitted.

        Raises:
            InputError: If there are fewer than two, or one can't be read.
        """
        if len(files) < 2:
            raise InputError(
                f"reconstruct: expected two views or more, got {len(files)}. Name more images, a "
                "folder, or a video."
            )
        fitting = Fitting.of(self.checkpoint, size=self.settings.size, mode=self.settings.fit)
        return fitting.load(files)

    def check_memory(self, images: Tensor) -> int:
        """Predict the peak before anything is computed.

        Returns:
            Bytes on the device.

        Raises:
            RetrofitError: If that is more than there is; the message says how many views fit.
        """
        config = self.checkpoint.config("")
        model = MemoryModel(
            lambda: network_class(self.name).from_config(config, strict=False),
            (images.shape[-2], images.shape[-1]),
            dtype_of=self._dtype_of,
            frames_per_chunk=self.settings.frames_per_chunk,
            offload=self.settings.offload and on_accelerator(self.settings.device),
            prepare=None if self.what is None else self._patch_in,
        )
        needed, available = model.need(len(images)), memory_info(self.settings.device)[0]
        if needed > available:
            fitting = model.fitting(available)
            advice = "Take fewer views, a smaller --size"
            raise RetrofitError(
                f"reconstruct: {len(images)} views of {images.shape[-1]}x{images.shape[-2]} take "
                f"{needed / 1e9:.1f} GB, {self.settings.device} has {available / 1e9:.1f} GB free, "
                f"enough for {fitting}. {advice}, --dtype bfloat16 or --offload."
            )
        return needed

    def open(self) -> nn.Module:
        """The network with its weights, patched where that was asked for; loaded once."""
        if self._model is None:
            self._model = load_networks(
                self.checkpoint, [""], device=self.settings.device, dtype=self._dtype
            )
            if self.what is not None:
                self._patch = self._patch_in(self._model)
        assert self._model is not None  # noqa: S101 - set above
        return self._model

    def _patch_in(self, network: nn.Module) -> Patch:
        assert self.what is not None  # noqa: S101 - the callers have looked
        return patch(network, self.what, sites=self.sites, **self.parameters)

    def run(
        self,
        files: Sequence[str | Path],
        *,
        check_memory: bool = True,
        progress: Progress | None = None,
    ) -> Result:
        """Reconstruct one scene.

        Args:
            files: Photos.
            check_memory: Whether to predict the peak first, which takes seconds.
            progress: Called as `progress(what, done, total)`.

        Raises:
            InputError: If the photos are too few or can't be read.
            RetrofitError: If they don't fit into memory.
            NonFiniteError: If the network gives NaN.
        """
        tell = progress or (lambda what, done, total: None)
        tell("reading images", 0, 1)
        images, fits = self.read_images([Path(file) for file in files])
        needed = self.check_memory(images) if check_memory else 0
        tell("loading the network", 0, 1)
        model = self.open()
        measuring = self._patch.measuring() if self._patch is not None else nullcontext()
        given = images[None].to(self.settings.device)
        run = functools.partial(
            model,
            given,
            frames_per_chunk=self.settings.frames_per_chunk,
            offload=self.settings.offload,
        )
        with torch.inference_mode(), measuring, _counting_blocks(model, tell):
            predictions, seconds = timed(run, given.device)
        return Result(
            scene=to_scene(predictions, images, fits),
            network=self.name,
            patch=self._patch,
            seconds=seconds,
            predicted_bytes=needed,
        )

    @functools.cached_property
    def _dtype(self) -> str | None:
        return running_dtype(self.checkpoint, self.settings.device, self.settings.dtype)

    def _dtype_of(self, name: str) -> torch.dtype | None:
        """A weight's dtype once it is loaded."""
        asked = self._dtype
        if asked is None:
            return torch_dtype(stored_dtype(self.checkpoint))
        return head_dtype(torch_dtype(asked)) if name.startswith(HEADS) else torch_dtype(asked)


def _require_network(checkpoint: Checkpoint) -> str:
    library, class_name = checkpoint.classes.get("", ("", ""))
    if library != "retrofit":
        what = checkpoint.pipeline_class or class_name or "something else"
        raise UnsupportedError(
            f"{checkpoint.name}: expected a VGGT or Pi3 checkpoint, got {what}. Give one such as "
            "facebook/VGGT-1B, or the bundled `rooms`."
        )
    return class_name


@contextmanager
def _counting_blocks(model: nn.Module, tell: Progress) -> Iterator[None]:
    """Tell the progress after every transformer block."""
    blocks = [
        block
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and name.endswith(("blocks", "decoder"))
        for block in part
        if find_interceptor(block) is None
    ]
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        tell("reconstructing", min(done, len(blocks)), len(blocks))

    hooks = [block.register_forward_hook(count) for block in blocks]
    try:
        tell("reconstructing", 0, len(blocks))
        yield
    finally:
        for hook in hooks:
            hook.remove()
