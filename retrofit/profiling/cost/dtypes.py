"""Give a network on meta the dtypes that it has once it is loaded."""

from __future__ import annotations

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


def set_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a checkpoint holds, but for the parts that stay in float32.

    Libraries keep some layers of a network out of half precision, and tables that are no part of a
    checkpoint (rotary angles) in the dtype that they are computed in.

    Args:
        module: On meta, as its config builds it.
        dtype: That it is loaded in.
    """
    wide = _wide_parts(module, dtype) if dtype in HALF else set()
    saved = set(module.state_dict())
    for prefix, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                path = f"{prefix}.{name}" if prefix else name
                if tensor is None or path not in saved or not tensor.is_floating_point():
                    continue
                target = torch.float32 if wide & set(path.split(".")) else dtype
                tensor.data = tensor.data.to(target)


def _wide_parts(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names, anywhere in a parameter's path, of what stays in float32."""
    names: set[str] = set()
    keep = getattr(module, "_keep_in_fp32_modules", None) or ()
    # transformers means float16 alone by it, and has a second list for both
    if not hasattr(module, "_keep_in_fp32_modules_strict") or dtype == torch.float16:
        names |= set([keep] if isinstance(keep, str) else keep)
    return names | set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
