"""Float8 weights that a single file keeps with a scale beside each: refuse them, or multiply."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from retrofit.checkpoints.weights import read_header
from retrofit.runtime.errors import CheckpointError

# one spelling is `scaled_fp8` and `x.scale_weight`, another `x.weight_scale` and `x.comfy_quant`
SCALES = (".scale_weight", ".weight_scale")
SCALE = re.compile(
    r"(^|\.)(scale_weight|weight_scale|comfy_quant|scale_input|input_scale|scaled_fp8)$"
)


def is_scale(name: str) -> bool:
    """Whether a tensor of this name says how another one is to be multiplied."""
    return SCALE.search(name) is not None


def refuse_scales(file: Path) -> None:
    """Refuse weights that the libraries would read without their scales.

    Raises:
        CheckpointError: With a command that multiplies them.
    """
    scales = [name for name in read_header(file) if is_scale(name)]
    if not scales:
        return
    out = file.with_name(f"{file.stem}-bfloat16.safetensors")
    raise CheckpointError(
        f"{file}: expected plain weights, got {len(scales)} scales beside them ({scales[0]}), "
        "which diffusers does not multiply by. Write a plain file, and give that: python -c "
        '"import sys; from retrofit.checkpoints.scales import multiply; multiply(*sys.argv[1:])" '
        f"{shlex.quote(str(file))} {shlex.quote(str(out))}"
    )


def multiply(file: str | Path, out: str | Path) -> None:
    """Write a file's weights multiplied by their scales, in bfloat16, without the scales.

    Raises:
        CheckpointError: If `out` exists, or weights are stored in another form than float8.
    """
    import torch
    from safetensors.torch import load_file, save_file

    if Path(out).exists():
        raise CheckpointError(f"{out}: exists. Give another name.")
    tensors = load_file(file)
    plain = {}
    for name, tensor in tensors.items():
        if is_scale(name):
            continue
        base = name.removesuffix(".weight")
        scale = next((tensors[base + end] for end in SCALES if base + end in tensors), None)
        if scale is not None:
            if tensor.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or (
                scale.numel() not in (1, len(tensor))
            ):
                raise CheckpointError(
                    f"{file}: {name}: expected float8 with one scale, or one a row, got "
                    f"{tensor.dtype} with scales {list(scale.shape)}. Fetch it in bfloat16."
                )
            tensor = tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
        plain[name] = tensor.to(torch.bfloat16) if scale is not None else tensor
    save_file(plain, out, metadata={"format": "pt"})
