"""Where attention's tiles lie in memory, and which of them see each other.

Key j is seen by query i iff i + leftmost <= j <= i + rightmost; each bound counts only where its
switch, LEFT or RIGHT, is on. Blocks that see nothing of each other are never visited, and only
those that a bound or the end cuts are masked.

Packed, sequence b's rows are cu[b] to cu[b + 1] of one long tensor: the tensors' batch stride is 0
then, and a program that is beyond its sequence's end leaves.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence(cu_ptr, batch, size):
    """Where a sequence starts in its tensor, and its size."""
    start = 0
    if cu_ptr is not None:
        start = tl.load(cu_ptr + batch)
        size = tl.load(cu_ptr + batch + 1) - start
    return start, size


@triton.jit
def head_at(ptr, batch, head, start, stride):
    """The address of a head's row; 64-bit, because a tensor may hold more than 2^31 elements."""
    plane = ptr + tl.cast(batch, tl.int64) * stride[0] + tl.cast(head, tl.int64) * stride[1]
    return plane + tl.cast(start, tl.int64) * stride[2]


@triton.jit
def plane_of(cu_ptr, batch, head, heads):
    """Which is a head's line, of those with a number for each row: packed, a head has but one."""
    return batch * heads + head if cu_ptr is None else head


@triton.jit
def line_at(ptr, cu_ptr, batch, head, heads, start, total):
    """The address of a head's first number of those that rows have one each of, as lse.

    They lie as (B, H, total), or packed as (H, total).
    """
    plane = plane_of(cu_ptr, batch, head, heads)
    return ptr + tl.cast(plane, tl.int64) * total + start


@triton.jit
def tiles_of(
    ptr, batches, heads, size, stride, WIDTH: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What `load_tile` reads BLOCK rows from, of so many heads from ptr on: a descriptor for the
    tensor memory accelerator (PTX ISA, "tensormap") or, as it is, the address."""
    tiles = ptr
    if DESCRIBED:
        tiles = tl.make_tensor_descriptor(
            ptr,
            [batches, heads, size, WIDTH],
            [stride[0], stride[1], stride[2], 1],
            [1, 1, BLOCK, DIM],
        )
    return tiles


@triton.jit
def head_of(tiles, batch, head, start, stride):
    """A head of those that `tiles_of` was given; a descriptor has all of them."""
    if not isinstance(tiles, tl.tensor_descriptor):
        tiles = head_at(tiles, batch, head, start, stride)
    return tiles


@triton.jit
def load_tile(
    tiles, batch, head, start, rows, size, stride,
    WIDTH: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """`load` of what `head_of` gave for this batch and head. A descriptor takes no registers for
    addresses and masks, and its tiles go past the registers into shared memory."""
    if isinstance(tiles, tl.tensor_descriptor):
        value = tiles.load([batch, head, start, 0]).reshape(rows.shape[0], DIM)
    else:
        value = load(tiles, start, rows, size, stride, WIDTH, DIM, TAIL)
    return value


@triton.jit
def lines_of(ptr, lines, size, pitch, BLOCK: tl.constexpr, DESCRIBED: tl.constexpr):
    """What `load_line` reads BLOCK numbers from, of so many lines from ptr on, as `tiles_of`."""
    found = ptr
    if DESCRIBED:
        found = tl.make_tensor_descriptor(ptr, [lines, size], [pitch, 1], [1, BLOCK])
    return found


@triton.jit
def load_line(lines, line, first, start, rows, size, pitch, OTHER: tl.constexpr):
    """A line's numbers of rows start + rows of a sequence that begins at `first`; OTHER from row
    `size` on. Without a descriptor, each thread that needs a number loads it itself."""
    if isinstance(lines, tl.tensor_descriptor):
        value = lines.load([line, start]).reshape(rows.shape[0])
        if OTHER != 0.0:
            value = tl.where(start + rows < size, value, OTHER)
    else:
        ptr = lines + tl.cast(line, tl.int64) * pitch + first
        value = tl.load(ptr + start + rows, mask=start + rows < size, other=OTHER)
    return value


@triton.jit
def load(
    ptr, start, rows, size, stride, WIDTH: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr
):
    """Rows start + rows of a head, DIM wide: zero from column WIDTH and, if TAIL, from row size.

    Offsets within a tile are 32-bit: the launcher copies a tensor whose strides do not allow it.
    Bytes are the bits of fp8 (e4m3), which become fp16.
    """
    cols = tl.arange(0, DIM)
    tile = ptr + tl.cast(start, tl.int64) * stride[2]
    tile = tile + rows[:, None] * stride[2] + cols[None, :] * stride[3]
    if TAIL:
        mask = (rows[:, None] < size - start) & (cols[None, :] < WIDTH)
        value = tl.load(tile, mask=mask, other=0.0)
    elif WIDTH < DIM:
        value = tl.load(tile, mask=cols[None, :] < WIDTH, other=0.0)
    else:
        value = tl.load(tile)
    if ptr.dtype.element_ty == tl.uint8:
        value = _decoded(value)
    return value


@triton.jit
def _decoded(bits):
    """e4m3 as fp16: its exponent in fp16's place is 8 too small, its subnormals fp16's own."""
    wide = bits.to(tl.int16)
    half = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half).to(tl.float16)


@triton.jit
def store(ptr, start, rows, size, stride, value, WIDTH: tl.constexpr, DIM: tl.constexpr):
    cols = tl.arange(0, DIM)
    tile = ptr + tl.cast(start, tl.int64) * stride[2]
    tile = tile + rows[:, None] * stride[2] + cols[None, :] * stride[3]
    mask = (rows[:, None] < size - start) & (cols[None, :] < WIDTH)
    tl.store(tile, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def clear_outside(
    head_ptr, cu_ptr, tile, batch, batches, total, stride, value,
    WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows before the first sequence or after the last one, which nobody else writes, get a value;
    the first tiles of the first and the last sequence see to them."""
    rows = tl.arange(0, ROWS)
    filler = tl.full([ROWS, DIM], value, tl.float32)
    first, last = tl.load(cu_ptr), tl.load(cu_ptr + batches)
    for start in range(0, first if (tile == 0) & (batch == 0) else 0, ROWS):
        store(head_ptr, start, rows, first, stride, filler, WIDTH, DIM)
    for start in range(last, total if (tile == 0) & (batch == batches - 1) else last, ROWS):
        store(head_ptr, start, rows, total, stride, filler, WIDTH, DIM)


@triton.jit
def key_bounds(
    start_m, seq_k, leftmost, rightmost,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a tile of queries sees: keys begin to whole and rest to end only some of its queries,
    keys whole to rest all. All but end are multiples of BLOCK_N."""
    begin, whole, rest, end = 0, 0, seq_k, seq_k
    if RIGHT:
        rest = tl.minimum(seq_k, tl.maximum(0, start_m + rightmost + 1))
        end = tl.minimum(seq_k, tl.maximum(0, start_m + rightmost + BLOCK_M))
    rest = rest // BLOCK_N * BLOCK_N
    if LEFT:
        begin = tl.maximum(0, start_m + leftmost) // BLOCK_N * BLOCK_N
        whole = tl.maximum(0, start_m + leftmost + BLOCK_M - 1 + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        whole = tl.maximum(begin, tl.minimum(whole, rest))
        rest = tl.maximum(whole, rest)
    return begin, whole, rest, end


@triton.jit
def query_bounds(
    start_n, seq_q, leftmost, rightmost, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries that see some of a tile's keys: begin to whole, and whole to end without a bound
    between them and any key. With bounds the latter are none unless SPLIT, which needs RIGHT alone.
    Begin and whole are multiples of BLOCK_M."""
    begin, whole, end = 0, 0, seq_q
    if RIGHT:
        begin = tl.maximum(0, start_n - rightmost) // BLOCK_M * BLOCK_M
    if LEFT:
        end = tl.minimum(seq_q, start_n + BLOCK_N - leftmost)
    if LEFT or RIGHT:
        whole = tl.cdiv(tl.maximum(0, end), BLOCK_M) * BLOCK_M
    if SPLIT:
        first = tl.maximum(0, start_n + BLOCK_N - 1 - rightmost)
        whole = tl.minimum(whole, tl.cdiv(first, BLOCK_M) * BLOCK_M)
    return begin, whole, end


@triton.jit
def within(rows, keys, leftmost, rightmost, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which of the keys the rows see by the bounds, at least one of which is on."""
    if LEFT and RIGHT:
        seen = (keys >= rows + leftmost) & (keys <= rows + rightmost)
    elif LEFT:
        seen = keys >= rows + leftmost
    else:
        seen = keys <= rows + rightmost
    return seen
