"""Run a per-frame function over a few frames at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def map_frames(
    function: Callable[[slice], tuple[Tensor, ...]],
    num_frames: int,
    chunk: int | None,
    device: torch.device | None = None,
) -> tuple[Tensor, ...]:
    """Call `function` for consecutive slices of frames and join what it returns on axis 0.

    Without gradients the results are written into tensors allocated once, so that no second copy
    of them exists at any time.

    Args:
        function: Takes a slice of frames, returns tensors whose axis 0 is those frames.
        num_frames: How many there are.
        chunk: Frames per call, None for all at once.
        device: Where the results are kept, None for where they are computed.

    Returns:
        The joined tensors.
    """
    if chunk is None or chunk >= num_frames:
        results = function(slice(0, num_frames))
        return results if device is None else tuple(result.to(device) for result in results)
    if torch.is_grad_enabled():
        parts = [function(frames) for frames in _slices(num_frames, chunk)]
        joined = (torch.cat(column) for column in zip(*parts, strict=True))
        return tuple(part if device is None else part.to(device) for part in joined)
    outputs: tuple[Tensor, ...] = ()
    for frames in _slices(num_frames, chunk):
        results = function(frames)
        outputs = outputs or tuple(
            result.new_empty((num_frames, *result.shape[1:]), device=device) for result in results
        )
        for output, result in zip(outputs, results, strict=True):
            output[frames] = result
    return outputs


def _slices(num_frames: int, chunk: int) -> Iterator[slice]:
    for start in range(0, num_frames, chunk):
        yield slice(start, min(start + chunk, num_frames))
