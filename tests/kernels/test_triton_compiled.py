"""What the Triton kernels become on GPUs that are not here: resources and instructions.

All of them: `python -m pytest tests/kernels/test_triton_compiled.py -m "slow or not slow"`.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from retrofit.kernels._triton_launch import Launch, choose_key_launch, choose_query_launch
from retrofit.kernels.block_select.triton_kernel import select_kernel
from retrofit.kernels.block_sparse.settings import MaskWork, choose_launch, load_settings
from retrofit.kernels.block_sparse.triton_backward_kernel import (
    block_sparse_bwd_dkv_kernel,
    block_sparse_bwd_dq_kernel,
)
from retrofit.kernels.block_sparse.triton_kernel import block_sparse_fwd_kernel
from retrofit.kernels.block_sparse.triton_route import kernel_constants
from retrofit.kernels.grid_window.triton_backward_kernel import (
    grid_window_bwd_dkv_kernel,
    grid_window_bwd_dq_kernel,
)
from retrofit.kernels.grid_window.triton_kernel import grid_window_fwd_kernel
from retrofit.kernels.grid_window.triton_route import choose_launch as choose_window_launch
from retrofit.kernels.merge.triton_kernel import merge_fwd_kernel
from tests.kernels.compiled import MATRIX, SHARED_LIMITS, Binary, compile_kernel

ARCHS = [80, 90, 100]
slow = pytest.mark.slow
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_block_sparse(
    arch: int,
    dtype: str,
    dim: int,
    block_size: tuple[int, int],
    *,
    has_descriptors: bool,
    work: MaskWork = MaskWork.NONE,
) -> tuple[Binary, Launch]:
    """The kernel for what a call needs: the end of the sequence always, masks as `work` says."""
    launch = choose_launch(
        arch, dim, SIZES[dtype], block_size, work, has_descriptors=has_descriptors
    )
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_out", "p_mask"), f"*{dtype}")
    types |= {"p_lse": "*fp32", "p_*": "*i32", "scale_log2": "fp32"}
    for name, rows in (("q", launch.block_m), ("k", launch.block_n), ("v", launch.block_n)):
        types[f"descriptor_{name}"] = f"tensordesc<{dtype}[{rows}, {dim}]>"
    constants: dict[str, Any] = {
        **kernel_constants(block_size, (dim, dim), launch),
        "SIGN": 1,
        "MASK_KIND": 4 if work == MaskWork.TILES else 0,
        "MASK_WORDS": -(-block_size[1] // 32) if work == MaskWork.TILES else 0,
        "IS_CAUSAL": work != MaskWork.NONE,
        "HAS_PARTIAL": True,
        "HAS_DESCRIPTORS": has_descriptors,
        "HAS_LSE": True,
    }
    if work != MaskWork.TILES:
        constants |= {"p_mask": None, "p_mask_ids": None, "p_mask_bits": None}
    if not has_descriptors:
        constants |= {f"descriptor_{name}": None for name in "qkv"}
    return compile_kernel(block_sparse_fwd_kernel, arch, types, constants, launch.options()), launch


def check(binary: Binary, arch: int, dtype: str) -> None:
    assert binary.stack <= (8 if arch == 100 else 0)
    assert binary.shared <= SHARED_LIMITS[arch]
    if dtype != "fp32":  # float32 is multiplied exactly, by ordinary units
        assert binary.instructions[MATRIX[arch]] > 0


FEW = [
    (80, "fp16", 64, (128, 64), False),
    (90, "bf16", 128, (128, 64), True),
    (100, "bf16", 128, (128, 64), True),
]
MANY = [
    (arch, dtype, dim, block_size, has_descriptors)
    for arch in ARCHS
    for dtype in ("bf16", "fp16")
    for dim in (64, 128)
    for block_size in ((128, 64), (64, 64))
    for has_descriptors in ((False,) if arch == 80 else (True, False))
]


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "block_size", "has_descriptors"),
    [*FEW, *(pytest.param(*case, marks=slow) for case in MANY if case not in FEW)],
)
def test_block_sparse_does_not_spill_and_prefetches_its_list(
    arch: int, dtype: str, dim: int, block_size: tuple[int, int], has_descriptors: bool
) -> None:
    binary, launch = compile_block_sparse(
        arch, dtype, dim, block_size, has_descriptors=has_descriptors
    )
    check(binary, arch, dtype)
    assert binary.instructions["LDGSTS"] >= 1
    assert (binary.instructions["UTMALDG"] > 0) == has_descriptors
    if launch.max_registers is not None:  # two programs at least share a processor
        assert binary.registers * 32 * launch.num_warps * 2 <= 65536


@slow
@pytest.mark.parametrize("work", [MaskWork.ROWS, MaskWork.TILES])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_masks_do_not_make_block_sparse_spill(arch: int, dim: int, work: MaskWork) -> None:
    binary, _ = compile_block_sparse(
        arch, "bf16", dim, (128, 64), has_descriptors=arch >= 90, work=work
    )
    check(binary, arch, "bf16")


@pytest.mark.parametrize("dim", [pytest.param(64, marks=slow), 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_float32_fits(arch: int, dim: int) -> None:
    binary, _ = compile_block_sparse(arch, "fp32", dim, (128, 64), has_descriptors=False)
    check(binary, arch, "fp32")


GRADIENTS = [
    (arch, dtype, dim, side)
    for arch in ARCHS
    for dtype in ("bf16", "fp16", "fp32")
    for dim in (64, 128)
    for side in ("queries", "keys")
]
GRADIENTS_FEW = [(90, "bf16", 64, "keys")]
every_gradient = pytest.mark.parametrize(
    ("arch", "dtype", "dim", "side"),
    [
        *GRADIENTS_FEW,
        *(pytest.param(*case, marks=slow) for case in GRADIENTS if case not in GRADIENTS_FEW),
    ],
)


def gradient_launch(side: str, dim: int, dtype: str, arch: int) -> Launch:
    return (choose_query_launch if side == "queries" else choose_key_launch)(
        dim, SIZES[dtype], arch
    )


def gradient_types(dtype: str) -> dict[str, str]:
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_dout", "p_out", "p_d*"), f"*{dtype}")
    return types | {"p_lse": "*fp32", "p_delta": "*fp32", "p_*": "*i32", "scale": "fp32"}


@every_gradient
def test_gradients_of_block_sparse_do_not_spill(arch: int, dtype: str, dim: int, side: str) -> None:
    launch = gradient_launch(side, dim, dtype, arch)
    constants: dict[str, Any] = {
        **kernel_constants((128, 64), (dim, dim), launch),
        "MASK_KIND": 0,
        "MASK_WORDS": 0,
        "IS_CAUSAL": False,
        "p_mask": None,
        "p_mask_ids": None,
        "p_mask_bits": None,
    }
    kernel = block_sparse_bwd_dkv_kernel
    if side == "queries":
        kernel = block_sparse_bwd_dq_kernel
        constants |= {"HAS_DLSE": False, "p_dlse": None}
    types = gradient_types(dtype)
    check(compile_kernel(kernel, arch, types, constants, launch.options()), arch, dtype)


WINDOW_FEW = [(90, "bf16", 64, (False, True, True))]
WINDOW_MANY = [
    (arch, dtype, dim, masked)
    for arch in ARCHS
    for dtype in ("bf16", "fp16")
    for dim in (64, 128)
    for masked in ((False,) * 3, (False, True, True), (True, True, False))
]


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "masked"),
    [*WINDOW_FEW, *(pytest.param(*c, marks=slow) for c in WINDOW_MANY if c not in WINDOW_FEW)],
)
def test_grid_windows_do_not_spill(
    arch: int, dtype: str, dim: int, masked: tuple[bool, bool, bool]
) -> None:
    launch = choose_window_launch(dim, SIZES[dtype], 128, arch)
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), f"*{dtype}")
    types |= {"p_lse": "*fp32", "p_*": "*i32", "scale_log2": "fp32"}
    constants = {**window_constants(dim, masked, launch), "HAS_LSE": True}
    binary = compile_kernel(grid_window_fwd_kernel, arch, types, constants, launch.options())
    check(binary, arch, dtype)


def window_constants(dim: int, masked: tuple[bool, bool, bool], launch: Launch) -> dict[str, Any]:
    """Compile-time arguments of a call without special tokens and masks."""
    return {
        "HEAD_DIM": dim,
        "VALUE_DIM": dim,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": dim,
        "BLOCK_V": dim,
        **{f"MASKED_{n}": is_masked for n, is_masked in enumerate(masked)},
        "SPECIAL_ROWS": False,
        "HAS_SPECIAL": False,
        "HAS_SEEN": False,
        "HAS_BIAS": False,
        "p_seen": None,
        "p_bias": None,
    }


@every_gradient
def test_gradients_of_grid_windows_do_not_spill(arch: int, dtype: str, dim: int, side: str) -> None:
    launch = gradient_launch(side, dim, dtype, arch)
    constants = window_constants(dim, (False, True, True), launch)
    kernel = grid_window_bwd_dkv_kernel
    if side == "queries":
        kernel = grid_window_bwd_dq_kernel
        constants |= {"HAS_DLSE": False, "p_dlse": None}
    types = gradient_types(dtype)
    check(compile_kernel(kernel, arch, types, constants, launch.options()), arch, dtype)


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=slow) for arch in (80, 100))])
def test_selection_and_merge_stay_in_registers(arch: int) -> None:
    types = {"p_scores": "*fp32", "p_kept": "*u8", "p_fewest": "*i64", "p_limit": "*fp32"}
    constants = {"BLOCK": 2048, "RULE": 0, "HAS_LIMIT": True}
    binary = compile_kernel(select_kernel, arch, types, constants, {"num_warps": 8})
    assert binary.stack == 0
    merge_types = {"p_*": "*fp32", "p_out": "*bf16"}
    merge_constants = {"VALUE_DIM": 128, "BLOCK_M": 32, "BLOCK_V": 128, "HAS_LSE": True}
    binary = compile_kernel(merge_fwd_kernel, arch, merge_types, merge_constants, {"num_warps": 4})
    assert binary.stack == 0


def test_the_table_has_settings_for_every_call() -> None:
    for arch in (75, 80, 86, 89, 90, 100, 103, 120):
        for size, dims in ((2, (16, 64, 128, 256)), (4, (16, 64, 128, 256))):
            for dim in dims:
                for block in ((1, 1), (64, 64), (128, 64), (1000, 7)):
                    for work in MaskWork:
                        launch = choose_launch(arch, dim, size, block, work, has_descriptors=False)
                        assert launch.block_m >= 16
                        assert launch.block_n >= 16
    assert {row["arch"] for row in load_settings()} == set(ARCHS)
