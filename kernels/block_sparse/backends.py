"""What each backend of block-sparse attention says to a call, and how it is run."""

from __future__ import annotations

from torch import Tensor

from retrofit.kernels._dispatch import OPERATORS, Probe, Support, choose_backend
from retrofit.kernels._triton import triton_supports
from retrofit.kernels.block_sparse.backward import attend_backward
from retrofit.kernels.block_sparse.eager import attend_on_cpu
from retrofit.kernels.block_sparse.flex import attend_by_flex, flex_supports
from retrofit.kernels.block_sparse.lists import BlockLists
from retrofit.kernels.block_sparse.native import attend_native, native_supports
from retrofit.kernels.block_sparse.plain import Problem, attend_eagerly, new_results
from retrofit.kernels.block_sparse.triton_backward import triton_backward
from retrofit.kernels.block_sparse.triton_route import triton_attention

OPERATOR = "block_sparse_attention"
KERNELS = {"triton": triton_attention, "native": attend_native, "flex": attend_by_flex}


def answers(probe: Probe) -> dict[str, Support]:
    """Whether each backend can run a call, in order of preference, and the reason if not."""
    flex, plain = {"flex": flex_supports(probe.device)}, {"torch": (True, "")}
    by_compiler = {**plain, **flex} if probe.device == "cpu" else {**flex, **plain}
    return {
        "triton": triton_supports(probe.device, probe.dtype, probe.head_dim),
        "native": native_supports(probe.device, probe.dtype, probe.num_tokens),
        **by_compiler,  # a graph of its own for each size: on a CPU only where it is asked for
        "reference": (True, ""),  # in the open, before the operator is reached
    }


OPERATORS[OPERATOR] = answers


def run_backend(
    problem: Problem, block_mask: Tensor | BlockLists, *, with_lse: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Run a call on the named backend, or on the best one if the name is empty.

    Returns:
        Output in the dtype of `value`, stored as `[B, S_q, H, D_v]`; log-sum-exp if asked for.
    """
    p = problem
    name = _choose(p, backend)
    out, lse = new_results(p.query, p.value)
    if not p.query.numel() or not p.value.numel() or _is_empty(block_mask):
        return out.zero_(), lse.fill_(float("-inf"))
    if name in KERNELS:
        KERNELS[name](p, block_mask, out=out, lse=lse if with_lse else None)
        return out, lse if with_lse else None
    if p.query.device.type == "cpu":
        return attend_on_cpu(p, block_mask, with_lse=with_lse)
    return attend_eagerly(p, block_mask)


def run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    problem: Problem,
    block_mask: Tensor | BlockLists,
    out: Tensor,
    lse: Tensor,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on the backend that ran the call, or by the PyTorch route where it has none."""
    p = problem
    is_empty = not p.query.numel() or not p.value.numel() or _is_empty(block_mask)
    if _choose(p, backend) == "triton" and not is_empty:
        return triton_backward(grad_out, grad_lse, p, block_mask, out, lse)
    return attend_backward(grad_out, grad_lse, p, block_mask, out)


def _choose(p: Problem, backend: str) -> str:
    """Name of the backend that runs a call."""
    probe = Probe(
        device=p.query.device.type,
        dtype=p.query.dtype,
        head_dim=max(p.query.shape[3], p.value.shape[3]),
        num_tokens=max(p.query.shape[2], p.key.shape[2]),
        is_strided=any(x.stride(3) != 1 for x in (p.query, p.key, p.value)),
    )
    return choose_backend(OPERATOR, probe, backend)


def _is_empty(block_mask: Tensor | BlockLists) -> bool:
    """Whether there is nothing to visit."""
    blocks = block_mask.indices if isinstance(block_mask, BlockLists) else block_mask
    return blocks.numel() == 0
