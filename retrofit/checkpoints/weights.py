"""Look at safetensors files without reading a tensor: are they whole, and what is in them."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.checkpoints.fingerprint import LEARNED
from retrofit.checkpoints.headers import HEADER_BYTES, TensorInfo, parse_header
from retrofit.runtime.errors import CheckpointError
from retrofit.runtime.reading import JSON_BYTES, open_regular, parse_json, read_bytes

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
BASES = ("model", "diffusion_pytorch_model")
SHARD = re.compile(r".*-\d{5}-of-\d{5}(\..+)?\.safetensors")
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
AGAIN = "Fetch the checkpoint again."


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The safetensors files of one network.

    Attributes:
        files: All that a loader reads.
        index: What lists them, None for a single file.
        variant: The variant in their names (`fp16`), None for the plain ones.
        dtype: The floating dtype of most of their bytes, as torch names it.
    """

    files: tuple[Path, ...]
    variant: str | None
    dtype: str
    index: Path | None = None

    def require_metadata(self) -> None:
        """Check that transformers and diffusers will take the index: they ask for `metadata`.

        Raises:
            CheckpointError: If it has none.
        """
        if self.index is not None and "metadata" not in _read_index(self.index):
            raise CheckpointError(
                f"{self.index}: expected `metadata` beside `weight_map`, got none, and no library "
                f'opens it so. Add "metadata": {{}} to it, or fetch the checkpoint again.'
            )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name.

    Raises:
        CheckpointError: If the file is cut short, too long, or not safetensors.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _corrupt(file, f"a header of {length} bytes in a file of {size}")
        if length > HEADER_BYTES:
            raise _corrupt(file, f"a header of {length} bytes, {HEADER_BYTES} at most")
        text = stream.read(length)
    try:
        tensors = parse_header(text)
    except ValueError as error:
        raise _corrupt(file, f"a header that can't be read ({error})") from error
    end = sum(tensor.num_bytes for tensor in tensors.values())
    if size != 8 + length + end:
        raise _corrupt(file, f"{size} bytes where its header says {8 + length + end}")
    return tensors


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.name != LEARNED]


def check_folder(folder: Path, *, convert: str) -> Weights:
    """Check that the weights of one network are all there and whole.

    Args:
        folder: Where they lie.
        convert: The command that turns a pickle here into safetensors, for the message.

    Raises:
        CheckpointError: If a file is missing, corrupt, or a pickle is all there is.
    """
    present = find_weights(folder)
    headers = {file.name: read_header(file) for file in present}
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    for index in indices:
        _check_index(index, headers)
    if not present:
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder}: expected safetensors, got only {', '.join(pickles[:3])}, and opening a "
                f"pickle can run any code. If you trust it, convert it: {convert}"
            )
        packed = sorted(folder.glob("*.gguf"))
        if packed:
            raise CheckpointError(
                f"{folder}: expected safetensors, got only {packed[0].name}, and GGUF files aren't "
                f"read. Write safetensors (needs `pip install gguf`): {_unpack_command(packed[0])}"
            )
        raise CheckpointError(f"{folder}: has no weights. {AGAIN}")
    return _choose_variant(folder, headers, indices)


def check_file(file: Path) -> Weights:
    """Check a single-file checkpoint.

    Raises:
        CheckpointError: If it is corrupt.
    """
    return Weights(files=(file,), variant=None, dtype=_main_dtype([read_header(file)]))


def refuse_pickle(file: Path) -> CheckpointError:
    """The error for a single-file checkpoint that is a pickle."""
    code = (
        "import sys, torch, safetensors.torch as s; "
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "s.save_file({k: v.clone() for k, v in w.get('state_dict', w).items() "
        "if hasattr(v, 'clone')}, sys.argv[2])"
    )
    return CheckpointError(
        f"{file}: expected safetensors, got a pickle, and opening one can run any code. If you "
        f'trust it, convert it: python -c "{code}" {shlex.quote(str(file))} '
        f"{shlex.quote(str(file.with_suffix('.safetensors')))}"
    )


def _unpack_command(file: Path) -> str:
    """The command that writes a GGUF file of a language model as a folder of safetensors."""
    folder = shlex.quote(str(file.parent))
    return (
        'python -c "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer '
        "as T; a, b, c = sys.argv[1:]; m = M.from_pretrained(a, gguf_file=b); "
        "m.hf_quantizer = None; vars(m.config).pop('quantization_config', None); "
        'm.save_pretrained(c); T.from_pretrained(a, gguf_file=b).save_pretrained(c)" '
        f"{folder} {shlex.quote(file.name)} {shlex.quote(str(file.parent) + '-safetensors')}"
    )


def _check_index(index: Path, headers: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    shards: dict[str, list[str]] = {}
    for tensor, shard in _read_index(index)["weight_map"].items():
        shards.setdefault(shard, []).append(tensor)
    missing = sorted(shard for shard in shards if shard not in headers)
    if missing:
        raise CheckpointError(
            f"{index.parent}: {index.name} lists {len(shards)} shards, {len(missing)} missing: "
            f"{', '.join(missing[:3])}. {AGAIN}"
        )
    for shard, tensors in shards.items():
        absent = [tensor for tensor in tensors if tensor not in headers[shard]]
        if absent:
            raise CheckpointError(
                f"{index.parent / shard}: expected {absent[0]} in it as {index.name} says, got a "
                f"shard without {len(absent)} of its tensors. {AGAIN}"
            )
        unlisted = sorted(headers[shard].keys() - set(tensors))
        if unlisted:
            raise CheckpointError(
                f"{index.parent / shard}: holds {len(unlisted)} tensors that {index.name} does not "
                f"list for it, such as {unlisted[0]}, and loaders disagree about those. {AGAIN}"
            )


def _read_index(index: Path) -> dict[str, Any]:
    try:
        data = parse_json(read_bytes(index, JSON_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{index}: expected JSON: {error}. {AGAIN}") from error
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(
            f"{index}: expected a `weight_map` from tensors to files, got none. {AGAIN}"
        )
    return dict(data)


def _choose_variant(
    folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]], indices: list[Path]
) -> Weights:
    """The files that a loader takes: the plain ones where they are there, else a variant's."""
    variants: dict[str | None, tuple[list[str], Path | None]] = {}
    for base in BASES:
        for name in headers:
            if name.startswith(f"{base}.") and not SHARD.fullmatch(name):
                middle = name.removeprefix(base).removesuffix(".safetensors").strip(".")
                variants.setdefault(middle or None, ([name], None))
        for index in indices:
            if index.name.startswith(f"{base}.safetensors.index"):
                middle = index.name.removeprefix(f"{base}.safetensors.index").removesuffix(".json")
                shards = sorted(set(_read_index(index)["weight_map"].values()))
                variants.setdefault(middle.strip(".") or None, (shards, index))
    if not variants:
        raise CheckpointError(
            f"{folder}: expected {' or '.join(f'{base}.safetensors' for base in BASES)} or their "
            f"index, got {', '.join(sorted(headers)[:3])}. Give one such file itself, or rename it."
        )
    variant = None if None in variants else sorted(v for v in variants if v is not None)[0]
    names, chosen = variants[variant]
    return Weights(
        files=tuple(folder / name for name in names),
        index=chosen,
        variant=variant,
        dtype=_main_dtype(headers[name] for name in names),
    )


def _main_dtype(headers: Iterable[Mapping[str, TensorInfo]]) -> str:
    numbers: Counter[str] = Counter()
    for header in headers:
        for tensor in header.values():
            if tensor.dtype in FLOATS:
                numbers[FLOATS[tensor.dtype]] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0] if numbers else "float32"


def _corrupt(file: Path, got: str) -> CheckpointError:
    return CheckpointError(f"{file}: expected a whole safetensors file, got {got}. {AGAIN}")
