"""What the Triton kernels share: rows of a program and columns of a step, looked up in tables.

Rows and columns are queries and keys in turn; in the gradients of keys they trade places.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# sizes of which no kernel is compiled anew
VARYING = [
    "num_special",
    *[f"{name}_{axis}" for name in ("tiles", "tile", "span") for axis in range(3)],
    "row_blocks",
    "num_heads",
    "groups",
    "seq_len",
    "mask_batch",
    "mask_head",
    "mask_token",
]


@triton.jit
def find_program(tiles, row_blocks, num_heads):
    """Batch, head, tile on each axis and block of its rows, of this program."""
    # one axis: the others of a launch hold 65535 programs, fewer than some batches have heads
    num_blocks = tiles[0] * tiles[1] * tiles[2] * row_blocks
    i_head = tl.program_id(0) // num_blocks
    i_block = tl.program_id(0) % num_blocks % row_blocks
    i_tile = tl.program_id(0) % num_blocks // row_blocks
    i_batch = (i_head // num_heads).to(tl.int64)
    i_head = (i_head % num_heads).to(tl.int64)
    i_axes = (i_tile // (tiles[2] * tiles[1]), i_tile // tiles[2] % tiles[1], i_tile % tiles[2])
    return i_batch, i_head, i_axes, i_block


@triton.jit
def split_slots(index, n_1, n_2):
    """Slots on the three axes of numbers within a tile, the slowest axis first."""
    rest = index // n_2
    return rest // n_1, rest % n_1, index % n_2


@triton.jit
def look_up(p_tables, i_axes, widths, slots, mask):
    """Positions of slots: what the tables of the axes say, added up."""
    found = tl.load(p_tables[0] + i_axes[0] * widths[0] + slots[0], mask=mask, other=0)
    found += tl.load(p_tables[1] + i_axes[1] * widths[1] + slots[1], mask=mask, other=0)
    found += tl.load(p_tables[2] + i_axes[2] * widths[2] + slots[2], mask=mask, other=0)
    return found


@triton.jit
def count_used(p_counts, i_axes):
    """Used slots of a tile on the three axes."""
    used_0 = tl.load(p_counts[0] + i_axes[0])
    used_1 = tl.load(p_counts[1] + i_axes[1])
    used_2 = tl.load(p_counts[2] + i_axes[2])
    return used_0, used_1, used_2


@triton.jit
def row_bounds(p_rows, i_tile, num_tiles, tile, slot, mask):
    """First column slot that a row slot sees, and one past the last."""
    p_low = p_rows + (num_tiles + i_tile) * tile + slot
    low = tl.load(p_low, mask=mask, other=0)
    high = tl.load(p_low + num_tiles * tile, mask=mask, other=0)
    return low, high


@triton.jit
def is_between(slot, low, high):
    """Whether each column slot lies within the bounds of each row."""
    return (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])


@triton.jit
def find_rows(
    p_rows,
    p_counts,
    p_special,
    num_special,
    i_axes,
    tiles,
    tile,
    used,
    i_block,
    BLOCK_M: tl.constexpr,
    MASKED_0: tl.constexpr,
    MASKED_1: tl.constexpr,
    MASKED_2: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,
    HAS_SPECIAL: tl.constexpr,
):
    """Rows of a program, and the columns that they walk.

    Returns:
        Position of each row, whether it is one, first and past the last column slot that it sees
        on each axis; then the first column of the walk, one past the last that has a place on the
        grid, and one past the last of all.
    """
    slot = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    low_0, low_1, low_2 = slot, slot, slot
    high_0, high_1, high_2 = slot, slot, slot
    last = used[0] * used[1] * used[2]
    first = last * 0
    if SPECIAL_ROWS:
        num_rows = num_special
        m_row = slot < num_rows
        row = tl.load(p_special + slot, mask=m_row, other=0)
    else:
        rows_0, rows_1, rows_2 = count_used(p_counts, i_axes)
        num_rows = rows_0 * rows_1 * rows_2
        m_row = slot < num_rows
        slots = split_slots(slot, rows_1, rows_2)
        row = look_up(p_rows, i_axes, tile, slots, m_row)
        if MASKED_0:
            low_0, high_0 = row_bounds(p_rows[0], i_axes[0], tiles[0], tile[0], slots[0], m_row)
            # in the order of this axis: columns before and after all rows are not visited
            first = tl.min(tl.where(m_row, low_0, used[0]), 0) * used[1] * used[2]
            last = tl.max(tl.where(m_row, high_0, 0), 0) * used[1] * used[2]
        if MASKED_1:
            low_1, high_1 = row_bounds(p_rows[1], i_axes[1], tiles[1], tile[1], slots[1], m_row)
        if MASKED_2:
            low_2, high_2 = row_bounds(p_rows[2], i_axes[2], tiles[2], tile[2], slots[2], m_row)
    end = last
    if HAS_SPECIAL:
        end = last + num_special
    end = tl.where(i_block * BLOCK_M < num_rows, end, first)  # tiles at the border are shorter
    lows, highs = (low_0, low_1, low_2), (high_0, high_1, high_2)
    return row.to(tl.int64), m_row, lows, highs, first, last, end


@triton.jit
def find_columns(
    p_columns,
    p_special,
    i_axes,
    span,
    used,
    n,
    last,
    end,
    lows,
    highs,
    MASKED_0: tl.constexpr,
    MASKED_1: tl.constexpr,
    MASKED_2: tl.constexpr,
    SPECIAL_ROWS: tl.constexpr,
    HAS_SPECIAL: tl.constexpr,
):
    """Columns `n` of a walk: position of each, whether it is one, and the pairs that are seen."""
    slots = split_slots(n, used[1], used[2])
    column = look_up(p_columns, i_axes, span, slots, n < last)
    m_column = n < end
    if HAS_SPECIAL:
        column += tl.load(p_special + (n - last), mask=m_column & (n >= last), other=0)
    m = m_column[None, :]
    if not SPECIAL_ROWS:
        m_special = (n >= last)[None, :]
        if MASKED_0:
            m &= is_between(slots[0], lows[0], highs[0]) | m_special
        if MASKED_1:
            m &= is_between(slots[1], lows[1], highs[1]) | m_special
        if MASKED_2:
            m &= is_between(slots[2], lows[2], highs[2]) | m_special
    return column.to(tl.int64), m_column, m
