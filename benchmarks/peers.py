"""Other people's operators on the same block lists; a peer that can't run says why."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import flex
from retrofit.profiling.bench.attention import Attention, Route
from retrofit.profiling.bench.checking import ROUNDED_SCORES
from retrofit.profiling.bench.patterns import block_sparse_route

LOW_PRECISION = 3e-2  # int8 products
WORKSPACE = 128 * 2**20  # bytes that FlashInfer asks for


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A peer that can't run here.

    Attributes:
        name: Of the peer.
        reason: For the reader of the table.
    """

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BlockProblem:
    """Attention over random block lists, for the peers.

    Attributes:
        attention: Queries, keys and values.
        block_mask: bool `[1, H, n_q, n_k]`, on the device.
        block_size: Query and key tokens of a block.
        ours: Our own route, whose expectation the others share.
    """

    attention: Attention
    block_mask: Tensor
    block_size: tuple[int, int]
    ours: Route

    def route(self, name: str, run: Callable[[], Tensor], **more: Any) -> Route:
        """Another way to the same result."""
        return replace(self.ours, name=name, run=run, **more)


def block_peers(problem: BlockProblem, names: Sequence[str]) -> list[Route | Missing]:
    """The peers that were asked for, each runnable or with the reason why not."""
    return [BLOCK_PEERS[name](problem) for name in names]


def _gather(problem: BlockProblem) -> Route | Missing:
    """Our PyTorch route: what runs where there is no compiler."""
    dtype = problem.attention.shape.dtype
    tolerance = ROUNDED_SCORES if dtype == torch.bfloat16 else None
    return block_sparse_route(
        problem.attention,
        problem.block_mask,
        problem.block_size,
        name="gather",
        backend="torch",
        tolerance=tolerance,
    )


def _row_loop(problem: BlockProblem) -> Route | Missing:
    """Python over query blocks: pick keys, then PyTorch's attention."""
    attention, (block_q, block_k) = problem.attention, problem.block_size
    seq_len = attention.shape.seq_len
    columns = torch.arange(seq_len, device=attention.query.device)
    rows = [
        (head, start, columns[row.repeat_interleave(block_k)[:seq_len]])
        for head, mask in enumerate(problem.block_mask[0])
        for start, row in zip(range(0, seq_len, block_q), mask, strict=True)
    ]

    def run() -> Tensor:
        out = torch.empty_like(attention.query)
        for head, start, keys in rows:
            query = attention.query[:, head, start : start + block_q]
            key, value = (
                x[:, head].index_select(1, keys) for x in (attention.key, attention.value)
            )
            out[:, head, start : start + block_q] = scaled_dot_product_attention(
                query[:, None], key[:, None], value[:, None]
            )[:, 0]
        return out

    return problem.route("row_loop", run)


def _flex(
    problem: BlockProblem, *, name: str = "flex", mode: str = "default", **options: Any
) -> Route:
    attention = problem.attention
    block_mask = flex.flex_lists(problem.block_mask, problem.block_size, attention.shape.seq_len)
    compiled = flex.compiled_flex(mode)

    def run() -> Tensor:
        out: Tensor = compiled(
            attention.query, attention.key, attention.value, block_mask=block_mask, **options
        )
        return out

    return problem.route(name, run, is_compiled=True)


def _flex_autotuned(problem: BlockProblem) -> Route | Missing:
    if problem.attention.shape.device == "cpu":
        return Missing(name="flex_autotuned", reason="no templates to tune on a CPU")
    return _flex(problem, name="flex_autotuned", mode="max-autotune-no-cudagraphs")


def _flex_flash(problem: BlockProblem) -> Route | Missing:
    missing = _needs(problem, "flex_flash", "flash_attn.cute", block=(128, 128))
    options = {"kernel_options": {"BACKEND": "FLASH"}}
    return missing or _flex(problem, name="flex_flash", **options)


def _sparge(problem: BlockProblem) -> Route | Missing:
    missing = _needs(problem, "sparge", "spas_sage_attn", block=(128, 64))
    if missing:
        return missing
    attend = importlib.import_module("spas_sage_attn").block_sparse_sage2_attn_cuda
    attention, mask = problem.attention, problem.block_mask.to(torch.int8).contiguous()

    def run() -> Tensor:
        made: Tensor = attend(attention.query, attention.key, attention.value, mask_id=mask)
        return made

    return problem.route("sparge", run, tolerance=LOW_PRECISION)


def _block_sparse_attn(problem: BlockProblem) -> Route | Missing:
    name = "block_sparse_attn"
    missing = _needs(problem, name, name, block=(128, 128))
    if missing:
        return missing
    attend = importlib.import_module(name).block_sparse_attn_func
    attention, shape = problem.attention, problem.attention.shape
    device = attention.query.device
    # it takes tokens before heads; the transposition is no part of what is timed
    query, key, value = (
        x.transpose(1, 2).reshape(-1, shape.heads, shape.head_dim).contiguous()
        for x in (attention.query, attention.key, attention.value)
    )
    ends = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.seq_len
    kinds = torch.ones(shape.heads, dtype=torch.int32, device=device)
    mask = problem.block_mask.expand(shape.batch, -1, -1, -1).contiguous()

    def run() -> Tensor:
        made: Tensor = attend(
            query, key, value, ends, ends, kinds, None, mask, shape.seq_len, shape.seq_len, 0.0
        )
        return made.view(shape.batch, shape.seq_len, shape.heads, -1).transpose(1, 2)

    return problem.route(name, run)


def _flashinfer(problem: BlockProblem) -> Route | Missing:
    missing = _needs(problem, "flashinfer", "flashinfer", block=None)
    if missing:
        return missing
    attention, shape = problem.attention, problem.attention.shape
    if shape.batch != 1:
        return Missing(name="flashinfer", reason="its block lists have no batch")
    sparse = importlib.import_module("flashinfer.sparse")
    device = attention.query.device
    wrapper = sparse.VariableBlockSparseAttentionWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    )
    rows, columns = (
        _block_lengths(shape.seq_len, block, device).expand(shape.heads, -1)
        for block in problem.block_size
    )
    # planning waits for the CPU and is no part of what is timed
    wrapper.plan(
        block_mask_map=problem.block_mask[0],
        block_row_sz=rows,
        block_col_sz=columns,
        num_qo_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.head_dim,
        q_data_type=shape.dtype,
    )

    def run() -> Tensor:
        made: Tensor = wrapper.run(attention.query[0], attention.key[0], attention.value[0])
        return made[None]

    return problem.route("flashinfer", run)


def _block_lengths(seq_len: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, seq_len, block, dtype=torch.int32, device=device)
    return (seq_len - starts).clamp(max=block)


def _needs(
    problem: BlockProblem, name: str, module: str, *, block: tuple[int, int] | None
) -> Missing | None:
    """Why a peer for GPUs can't run, if it can't."""
    if reason := import_failure(module):
        return Missing(name=name, reason=reason)
    if problem.attention.shape.device != "cuda":
        return Missing(name=name, reason="needs a GPU")
    if block is not None and problem.block_size != block:
        return Missing(name=name, reason=f"takes blocks of {block[0]} by {block[1]} tokens only")
    if problem.attention.shape.dtype == torch.float32:
        return Missing(name=name, reason="takes float16 and bfloat16 only")
    return None


def import_failure(module: str) -> str:
    """Why a module can't be imported, or nothing."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({' '.join(str(error).split())})"
    except Exception as error:  # noqa: BLE001 - a package that is broken here is a missing one
        return f"can't be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    return ""


BLOCK_PEERS: dict[str, Callable[[BlockProblem], Route | Missing]] = {
    "flex": _flex,
    "flex_autotuned": _flex_autotuned,
    "flex_flash": _flex_flash,
    "gather": _gather,
    "row_loop": _row_loop,
    "sparge": _sparge,
    "block_sparse_attn": _block_sparse_attn,
    "flashinfer": _flashinfer,
}
