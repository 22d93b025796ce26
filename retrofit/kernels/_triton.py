"""What the Triton routes share: when they can run, and on what."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from retrofit.kernels._dispatch import Support

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
INTERPRETED = 90  # capability that stands for the interpreter
INTERPRETED_PROCESSORS = 4


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_supports(device: str, dtype: torch.dtype, head_dim: int) -> Support:
    """Whether the Triton kernels can run a call, and the reason if not.

    Args:
        device: Device type.
        dtype: Of query, key and value.
        head_dim: Of keys or values, the larger.
    """
    if device != "cuda" and not (device == "cpu" and is_interpreted()):
        return False, f"tensors on {device}; the Triton kernel runs on a GPU"
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; pip install triton"
    if dtype not in DTYPES:
        return False, f"{dtype}; the Triton kernel takes float16, bfloat16 and float32"
    if device == "cpu" and dtype == torch.bfloat16:
        return False, "torch.bfloat16; Triton's interpreter multiplies its bits as integers"
    if head_dim > MAX_HEAD_DIM:
        return False, f"head dim {head_dim}; the Triton kernel takes at most {MAX_HEAD_DIM}"
    return True, ""


def capability(device: torch.device) -> int:
    """Compute capability times ten: 90 for an H100 or H200."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def pad_dim(dim: int) -> int:
    """Head dim as a tile holds it: a power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def with_adjacent_channels(x: Tensor) -> Tensor:
    """The tensor, copied if the kernels could not read its last axis."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
