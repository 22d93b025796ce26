"""ControlNets, LoRAs and IP-Adapters: load them, or say in one line why they don't fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.hub import fetch
from retrofit.checkpoints.opening import load_networks
from retrofit.checkpoints.warned import collecting_warnings
from retrofit.checkpoints.weights import read_header
from retrofit.runtime.errors import CheckpointError, InputError, UnsupportedError
from retrofit.sampling.request import Request

# what the libraries raise for weights and configs that they can't use
LIBRARY_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, OSError, ImportError)

# how the two matrices of a layer are told apart, in peft's files, kohya's and diffusers' old ones
LORA_TENSORS = (".alpha", ".weight")
COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
LORA_HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"), (".down.", ".up."))


def open_controlnet(pipeline: Any, request: Request, dtype: str | None) -> Any:
    """Load a ControlNet, after its config has been held against the UNet's.

    Raises:
        InputError: If it does not fit.
    """
    where = f"--controlnet {request.controlnet}"
    found = find_checkpoint(str(request.controlnet))
    kinds = [kind for _, kind in found.classes.values()]
    if found.pipeline_class is not None or not all("ControlNet" in kind for kind in kinds):
        raise InputError(
            f"{where}: expected a ControlNet, got {found.pipeline_class or ', '.join(kinds)}. "
            "Give the folder of a ControlNet alone."
        )
    network: Any = getattr(pipeline, "unet", None)
    config = found.config("")
    keys = ("cross_attention_dim", "block_out_channels", "in_channels", "addition_embed_type")
    for key in keys if network is not None else ():
        mine, theirs = network.config.get(key), config.get(key)
        if key in config and _plain(mine) != _plain(theirs):
            raise InputError(
                f"{where}: made for another architecture: its {key} is {theirs}, this "
                f"checkpoint's is {mine}. Give a ControlNet of the same model."
            )
    return load_networks(found, [""], device="cpu", dtype=dtype or _name_of(pipeline.dtype))


def add_loras(pipeline: Any, request: Request) -> None:
    """Load LoRAs and give them their weights.

    Raises:
        InputError: If one does not fit.
    """
    fix = "Give a LoRA in safetensors, trained on the same architecture."
    names = []
    for i, (path, _) in enumerate(request.loras):
        what = f"--lora {path}"
        if not hasattr(pipeline, "load_lora_weights"):
            raise UnsupportedError(
                f"{what}: {type(pipeline).__name__} takes no LoRA. Leave it out."
            )
        location = _file_or_hub(path, what)
        _require_lora(_read_names(location, what, fix), what, fix)
        _refuse_unplaced(pipeline, _read_tensors(location), what)
        with _refusing(what, fix):
            pipeline.load_lora_weights(adapter_name=f"lora{i}", **location)
        listed = {name for names in pipeline.get_list_adapters().values() for name in names}
        if f"lora{i}" not in listed:
            raise InputError(f"{what}: none of its layers is one of this checkpoint's. {fix}")
        names.append(f"lora{i}")
    if names:
        pipeline.set_adapters(names, [weight for _, weight in request.loras])


def _file_or_hub(path: str, what: str) -> dict[str, Any]:
    """Arguments of diffusers' loaders of adapters: a local file or folder, or a hub id."""
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".safetensors":
            raise InputError(
                f"{what}: expected a .safetensors file, as others may be pickles, and opening one "
                "can run any code. Give it in safetensors."
            )
        return {
            "pretrained_model_name_or_path_or_dict": str(local.parent),
            "weight_name": local.name,
        }
    if local.is_dir():
        files = sorted(local.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(
                f"{what}: expected a folder with one .safetensors file, got {len(files)}. "
                "Name the file."
            )
        return {"pretrained_model_name_or_path_or_dict": str(local), "weight_name": files[0].name}
    parts = path.split("/")
    if len(parts) < 2 or path.startswith((".", "/", "~")):
        raise InputError(f"{what}: no such file or folder. A hub id looks like `owner/name`.")
    inside = "/".join(parts[2:])
    is_file = inside.endswith(".safetensors")
    folder = fetch("/".join(parts[:2]), [inside if is_file else f"{inside}*.safetensors"])
    return _file_or_hub(str(folder / inside), what)


def add_ip_adapter(pipeline: Any, request: Request) -> None:
    """Load an IP-Adapter, and its image encoder if the checkpoint has none.

    Raises:
        InputError: If it does not fit, or there is no image encoder.
    """
    if request.ip_adapter is None:
        return
    what = f"--ip-adapter {request.ip_adapter}"
    if not hasattr(pipeline, "load_ip_adapter"):
        raise UnsupportedError(f"{what}: {type(pipeline).__name__} takes none. Leave it out.")
    location = _file_or_hub(request.ip_adapter, what)
    encoder = Path(location["pretrained_model_name_or_path_or_dict"]) / "image_encoder"
    if getattr(pipeline, "image_encoder", None) is None and not encoder.is_dir():
        raise InputError(
            f"{what}: needs an image encoder, and neither the checkpoint nor a folder "
            f"image_encoder/ beside it has one. Put it there."
        )
    fix = "Give an IP-Adapter of the same architecture."
    names = _read_names(location, what, fix)
    with _refusing(what, fix):
        pipeline.load_ip_adapter(
            subfolder="",
            image_encoder_folder="image_encoder" if encoder.is_dir() else None,
            **location,
        )
    _refuse_unplaced_layers(pipeline, names, what)
    if request.ip_scale is not None:
        pipeline.set_ip_adapter_scale(request.ip_scale)


def _read_names(location: dict[str, Any], what: str, fix: str) -> list[str]:
    """The tensors' names, from the header of a safetensors file before a library reads it.

    Raises:
        InputError: If it is damaged, or something else of that name.
    """
    file = Path(location["pretrained_model_name_or_path_or_dict"]) / location["weight_name"]
    try:
        return list(read_header(file))
    except CheckpointError as error:
        raise InputError(
            f"{what}: expected a whole safetensors file, got a damaged one or something else. {fix}"
        ) from error


def _require_lora(names: list[str], what: str, fix: str) -> None:
    """Look for matrices of low rank, in pairs.

    Raises:
        InputError: If there are none, or one lacks its other half.
    """
    halves = [name for name in names if "lora" in name.lower()]
    if not halves:
        raise InputError(f"{what}: expected a LoRA, got a file that holds none. {fix}")
    for name in halves:
        down, up = next((pair for pair in LORA_HALVES if pair[0] in name), ("", ""))
        if down and name.replace(down, up) not in names:
            raise InputError(
                f"{what}: expected {name.replace(down, up)} beside {name}, got only one half of "
                "that layer. Fetch it again."
            )


def _read_tensors(location: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    folder = Path(location["pretrained_model_name_or_path_or_dict"])
    return load_file(folder / location["weight_name"])


def _refuse_unplaced(pipeline: Any, tensors: dict[str, Any], what: str) -> None:
    """Refuse a LoRA of which the library's conversion leaves tensors out.

    Raises:
        InputError: With their names.
    """
    from retrofit.checkpoints.tracing import sources_of, trace

    traced, read = trace(tensors)
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    try:
        with collecting_warnings():
            converted, *_ = pipeline.lora_state_dict(traced, return_lora_metadata=True, **options)
    except (*LIBRARY_ERRORS, CheckpointError) as error:
        left = [name for name in tensors if not name.endswith(LORA_TENSORS)]
        _refuse_left_out(left, what, cause=error)
        raise InputError(
            f"{what}: does not fit this checkpoint ({first_line(error)}). Give a LoRA in "
            "safetensors, trained on the same architecture."
        ) from error
    loadable = tuple(f"{part}." for part in pipeline._lora_loadable_modules)
    placed = set(read)
    for name, tensor in converted.items():
        # diffusers takes names without a component for those of the denoising network
        if name.startswith(loadable) or not name.startswith(COMPONENTS):
            placed |= sources_of(tensor)
    _refuse_left_out([name for name in tensors if name not in placed], what)


def _refuse_left_out(left: list[str], what: str, *, cause: Exception | None = None) -> None:
    if left:
        raise InputError(
            f"{what}: {len(left)} of its tensors have no place in this checkpoint "
            f"({', '.join(sorted(left)[:3])}): without them it would not be the LoRA that was "
            "trained. Give one in plain low-rank form, as peft saves it, trained on the same "
            "architecture."
        ) from cause


def _refuse_unplaced_layers(pipeline: Any, names: list[str], what: str) -> None:
    """Refuse an IP-Adapter with layers that this UNet does not have, or with other tensors.

    Raises:
        InputError: With their names.
    """
    processors = pipeline.unet.attn_processors.values()
    count = sum(hasattr(processor, "to_k_ip") for processor in processors)
    numbers = {str(2 * i + 1) for i in range(count)}
    left = [
        name
        for name in names
        if not name.startswith("image_proj.")
        and not (name.startswith("ip_adapter.") and name.split(".")[1] in numbers)
    ]
    if left:
        raise InputError(
            f"{what}: {len(left)} of its tensors have no place in this checkpoint "
            f"({', '.join(sorted(left)[:3])}). Give an IP-Adapter of the same architecture."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _refusing(what: str, fix: str) -> Iterator[None]:
    """What a library says of weights that don't fit, as one line."""
    try:
        with collecting_warnings():
            yield
    except (*LIBRARY_ERRORS, CheckpointError) as error:
        raise InputError(
            f"{what}: does not fit this checkpoint ({first_line(error)}). {fix}"
        ) from error


def first_line(error: BaseException) -> str:
    """What a library says, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) < 200 else f"{text[:200]} ..."
