"""Attention of a few new queries over a cache of keys and values, contiguous or in pages.

A program owns one key head of one sequence and a part of its keys: the rows of all queries that
read that head are one tile, so that each key and value is read once, and the keys are split over
programs because a step of decoding has too few heads and queries to fill a GPU (Dao et al. 2023,
"Flash-Decoding for long-context inference"). Each part leaves its output and its log-sum-exp, which
`combine_attention.py` combines exactly; a single part writes the results themselves. The address of
each key is worked out by itself: with a table, of its page (Kwon et al. 2023, PagedAttention), so
that pages may have any size.

New keys and values are rotated (Su et al. 2021, "RoFormer") and appended by a kernel of their own,
before: programs that read them could not wait for the one that writes them.

Lengths and page numbers are read here and nowhere else. A length beyond the cache counts as the
whole cache, and a page that there is not is not written, and read as the last one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import hardware
from .combine_attention import combine
from .launch import launch, made, replayed
from .products import add_product

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
SIZES = [
    "heads_k", "group", "seq_q", "new", "capacity", "page_size", "pages", "left", "right", "splits",
    "positions",
]  # fmt: skip


@triton.jit
def _rotated(
    x, row_ptrs, rows, cols, stride_col, positions, mask,
    cos_ptr, sin_ptr, stride_cos, stride_sin,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """x, whose elements below 2 * HALF are turned by the angles of their row's position. Each meets
    the other one of its pair by being loaded once more: a shuffle would take shared memory."""
    if INTERLEAVED:
        other, angle, first = cols ^ 1, cols // 2, cols % 2 == 0
    else:
        first = cols < HALF
        other, angle = tl.where(first, cols + HALF, cols - HALF), cols % HALF
    turned = cols < 2 * HALF
    both = mask[:, None] & turned[None, :]
    y = tl.load(row_ptrs[:, None] + (other * stride_col)[None, :], mask=both, other=0.0)
    at = positions.to(tl.int64)[:, None]
    cos = tl.load(cos_ptr + at * stride_cos[0] + (angle * stride_cos[1])[None, :], both, other=1.0)
    sin = tl.load(sin_ptr + at * stride_sin[0] + (angle * stride_sin[1])[None, :], both, other=0.0)
    sin = tl.where(first[None, :], -sin.to(tl.float32), sin.to(tl.float32))
    wide = x.to(tl.float32) * cos.to(tl.float32) + y.to(tl.float32) * sin
    return tl.where(turned[None, :], wide, x.to(tl.float32)).to(x.dtype)


@triton.jit
def _key_rows(
    ptr, table_row, keys, batch, head, stride, stride_table, page_size, pages, mask,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Where each key's row begins, and which of them are in no page that there is."""
    if PAGED:
        page = tl.load(table_row + (keys // page_size).to(tl.int64) * stride_table, mask, other=0)
        known = (page >= 0) & (page < pages)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        slot = (keys % page_size).to(tl.int64)
        return ptr + page * stride[0] + head * stride[1] + slot * stride[2], known
    return ptr + batch * stride[0] + head * stride[1] + keys.to(tl.int64) * stride[2], mask


@triton.jit(do_not_specialize=SIZES)
def append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, cos_ptr, sin_ptr,
    stride_k_new, stride_v_new, stride_k, stride_v, stride_lengths, stride_table,
    stride_cos, stride_sin,
    heads_k, new, capacity, page_size, pages, positions,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAGED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(new, BLOCK)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = (plane // heads_k).to(tl.int64), (plane % heads_k).to(tl.int64)
    length = tl.load(lengths_ptr + batch * stride_lengths)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    keys = length + rows
    # Nothing of a sequence whose length leaves no room.
    mask = rows < tl.where((length >= 0) & (length <= capacity - new), new, 0)
    table_row = table_ptr + batch * stride_table[0] if PAGED else table_ptr
    k_rows, known = _key_rows(
        k_ptr, table_row, keys, batch, head, stride_k, stride_table[1], page_size, pages, mask,
        PAGED,
    )  # fmt: skip
    v_rows, _ = _key_rows(
        v_ptr, table_row, keys, batch, head, stride_v, stride_table[1], page_size, pages, mask,
        PAGED,
    )  # fmt: skip
    mask = mask & known
    cols = tl.arange(0, DIM)
    k_at = k_new_ptr + batch * stride_k_new[0] + head * stride_k_new[1]
    k_at = k_at + rows.to(tl.int64) * stride_k_new[2]
    wide = mask[:, None] & (cols < HEAD)[None, :]
    k = tl.load(k_at[:, None] + (cols * stride_k_new[3])[None, :], mask=wide, other=0.0)
    if HALF > 0:
        k = _rotated(
            k, k_at, rows, cols, stride_k_new[3], tl.minimum(keys, positions - 1), mask,
            cos_ptr, sin_ptr, stride_cos, stride_sin, HALF, INTERLEAVED,
        )  # fmt: skip
    tl.store(k_rows[:, None] + (cols * stride_k[3])[None, :], k, mask=wide)
    cols_v = tl.arange(0, DIM_V)
    v_at = v_new_ptr + batch * stride_v_new[0] + head * stride_v_new[1]
    v_at = v_at + rows.to(tl.int64) * stride_v_new[2]
    wide_v = mask[:, None] & (cols_v < HEAD_V)[None, :]
    v = tl.load(v_at[:, None] + (cols_v * stride_v_new[3])[None, :], mask=wide_v, other=0.0)
    tl.store(v_rows[:, None] + (cols_v * stride_v[3])[None, :], v, mask=wide_v)


@triton.jit
def _tanh(x):
    """1 - 2 / (e^2x + 1) has no digits left where x is small: there Taylor's series, to x^15."""
    size = tl.abs(x)
    square = tl.minimum(size, 0.5) * tl.minimum(size, 0.5)
    series = tl.full(x.shape, -0.001456, tl.float32)
    series = series * square + 0.003592128
    series = series * square - 0.008863236
    series = series * square + 0.021869489
    series = series * square - 0.053968254
    series = series * square + 0.133333333
    series = series * square - 0.333333333
    small = size + size * square * series
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    found = tl.where(size < 0.5, small, large)
    return tl.where(x < 0.0, -found, found)


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, cos_ptr, sin_ptr, slopes_ptr, sinks_ptr,
    out_ptr, lse_ptr,
    stride_q, stride_k, stride_v, stride_lengths, stride_table, stride_cos, stride_sin,
    stride_slopes, stride_out, stride_lse,
    heads_k, group, seq_q, new, capacity, page_size, pages, positions, left, right, splits,
    scale, softcap,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAGED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAP: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Strides of out and lse end with a split's; with a single split, sinks are counted here."""
    tiles = tl.cdiv(group * seq_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    split = tl.program_id(1)
    batch, head_k = (plane // heads_k).to(tl.int64), (plane % heads_k).to(tl.int64)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head, i = plane % heads_k * group + r // seq_q, r % seq_q
    mask_m = r < group * seq_q
    length = tl.maximum(tl.load(lengths_ptr + batch * stride_lengths), 0)
    total = tl.minimum(length, capacity - new) + new

    cols = tl.arange(0, DIM)
    q_rows = q_ptr + batch * stride_q[0] + head.to(tl.int64) * stride_q[1]
    q_rows = q_rows + i.to(tl.int64) * stride_q[2]
    mask_q = mask_m[:, None] & (cols < HEAD)[None, :]
    q = tl.load(q_rows[:, None] + (cols * stride_q[3])[None, :], mask=mask_q, other=0.0)
    if HALF > 0:
        own = tl.maximum(total - new, 0) + (i if LEFT or RIGHT else 0 * i)
        q = _rotated(
            q, q_rows, r, cols, stride_q[3], tl.minimum(own, positions - 1), mask_m,
            cos_ptr, sin_ptr, stride_cos, stride_sin, HALF, INTERLEAVED,
        )  # fmt: skip

    diagonal = i + total - seq_q  # the key that stands where the query does
    first = tl.maximum(0, total - seq_q - left) if LEFT else 0
    size = tl.cdiv(tl.cdiv(tl.maximum(total - first, 0), splits), BLOCK_N) * BLOCK_N
    start = first + split * size
    end = tl.minimum(start + size, total)
    if SLOPES:
        slope = tl.load(
            slopes_ptr + batch * stride_slopes[0] + head * stride_slopes[1], mask=mask_m, other=0.0
        )
    table_row = table_ptr + batch * stride_table[0] if PAGED else table_ptr
    cols_v = tl.arange(0, DIM_V)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_V], tl.float32)
    for begin in range(start, end, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        mask_n = keys < end
        k_rows, _ = _key_rows(
            k_ptr, table_row, keys, batch, head_k, stride_k, stride_table[1], page_size, pages,
            mask_n, PAGED,
        )  # fmt: skip
        mask_k = mask_n[:, None] & (cols < HEAD)[None, :]
        k = tl.load(k_rows[:, None] + (cols * stride_k[3])[None, :], mask=mask_k, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAP:
            scores = _tanh(scores / softcap) * softcap
        if SLOPES:
            scores -= slope[:, None] * tl.abs(diagonal[:, None] - keys[None, :]).to(tl.float32)
        seen = mask_n[None, :]
        if LEFT:
            seen = seen & (keys[None, :] >= (diagonal - left)[:, None])
        if RIGHT:
            seen = seen & (keys[None, :] <= (diagonal + right)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet must not compute inf - inf.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2((scores - shift[:, None]) * LOG2_E)
        alpha = tl.exp2((row_max - shift) * LOG2_E)
        row_max = new_max
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v_rows, _ = _key_rows(
            v_ptr, table_row, keys, batch, head_k, stride_v, stride_table[1], page_size, pages,
            mask_n, PAGED,
        )  # fmt: skip
        mask_v = mask_n[:, None] & (cols_v < HEAD_V)[None, :]
        v = tl.load(v_rows[:, None] + (cols_v * stride_v[3])[None, :], mask=mask_v, other=0.0)
        acc = add_product(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)

    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=mask_m, other=float("-inf"))
        new_max = tl.maximum(row_max, sink)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - shift) * LOG2_E)
        row_sum = row_sum * alpha + tl.exp2((sink - shift) * LOG2_E)
        acc = acc * alpha[:, None]
        row_max = new_max
    # A row that saw nothing has row_max -inf and acc 0, which are its lse and its output.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse = row_max + tl.log2(row_sum) * LN_2
    lse_at = lse_ptr + split.to(tl.int64) * stride_lse[3] + batch * stride_lse[0]
    lse_at = lse_at + head.to(tl.int64) * stride_lse[1] + i.to(tl.int64) * stride_lse[2]
    tl.store(lse_at, lse, mask=mask_m)
    out_at = out_ptr + split.to(tl.int64) * stride_out[4] + batch * stride_out[0]
    out_at = out_at + head.to(tl.int64) * stride_out[1] + i.to(tl.int64) * stride_out[2]
    tile_out = out_at[:, None] + (cols_v * stride_out[3])[None, :]
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(tile_out, out, mask=mask_m[:, None] & (cols_v < HEAD_V)[None, :])


class Config(NamedTuple):
    BLOCK_N: int
    num_warps: int
    num_stages: int


# By head size: up to 64, 128, 256. Reading the cache is all that takes time, so tiles of keys are
# as large as fit a small share of the shared memory two or three times (several programs hide each
# other's latency) and no register spills. fp32 products run on the CUDA cores: smaller tiles.
CONFIGS = {
    "16-bit": (Config(128, 4, 3), Config(64, 4, 3), Config(32, 4, 3)),
    "fp32": (Config(64, 4, 2), Config(32, 8, 2), Config(16, 4, 2)),
}
MOST_ROWS = 64  # of a tile: more would spill
FEWEST_KEYS = 256  # of a split: fewer, and what a split writes begins to count


def _splits(query: torch.Tensor, programs: int, capacity: int, num_splits: int) -> int:
    """Enough to occupy every multiprocessor twice over, judged by the cache's capacity, since the
    lengths are not to be waited for."""
    if num_splits > 0:
        return max(1, min(num_splits, capacity, 1024))
    wanted = 2 * hardware.of(query).multiprocessors // max(programs, 1)
    return max(1, min(wanted, capacity // FEWEST_KEYS, 128))


@replayed
def forward(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    block_table: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    rotary_interleaved: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, Sq, Dv), in query's memory order of heads and rows, and lse (B, H, Sq)."""
    batch, heads, seq_q, head = query.shape
    heads_k, page_size, head_v = v_cache.shape[1:]
    if query.stride(1) < query.stride(2):
        out = made(query.new_empty(batch, seq_q, heads, head_v).transpose(1, 2))
    else:
        out = made(query.new_empty(batch, heads, seq_q, head_v))
    lse = made(query.new_empty(batch, heads, seq_q, dtype=torch.float32))
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    if k_cache.shape[0] == 0:
        capacity = 0
    new = 0 if k_new is None else k_new.shape[2]
    common: dict[str, Any] = {
        "HEAD": head,
        "HEAD_V": head_v,
        # tl.dot wants powers of two, 16 at least.
        "DIM": max(16, triton.next_power_of_2(head)),
        "DIM_V": max(16, triton.next_power_of_2(head_v)),
        "PAGED": block_table is not None,
        "HALF": 0 if rotary_cos is None else rotary_cos.shape[1],
        "INTERLEAVED": rotary_interleaved,
        "enable_fp_fusion": True,
    }
    angles = (rotary_cos, rotary_sin)
    stride_table = (0, 0) if block_table is None else block_table.stride()
    stride_angles = tuple((0, 0) if t is None else t.stride() for t in angles)
    positions = 1 if rotary_cos is None else rotary_cos.shape[0]
    sizes = (capacity, max(page_size, 1), k_cache.shape[0], positions)
    with hardware.guard(query.device):
        if k_new is not None and v_new is not None and k_new.numel() + v_new.numel() > 0:
            block = min(16, triton.next_power_of_2(new))
            launch(
                append_kernel, (batch * heads_k * triton.cdiv(new, block),),
                k_new, v_new, k_cache, v_cache, cache_seqlens, block_table, *angles,
                k_new.stride(), v_new.stride(), k_cache.stride(), v_cache.stride(),
                cache_seqlens.stride(0), stride_table, *stride_angles,
                heads_k, new, *sizes, BLOCK=block, num_warps=4, **common,
            )  # fmt: skip
        if lse.numel() == 0:
            return out, lse
        rows = heads // heads_k * seq_q
        block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
        if query.dtype == torch.float32 or max(head, head_v) > 128:
            block_m = 16
        programs = batch * heads_k * triton.cdiv(rows, block_m)
        splits = _splits(query, programs, capacity, num_splits)
        partial, partial_lse = out, lse
        if splits > 1:
            shape = (splits, batch, heads, seq_q)
            partial = made(query.new_empty(*shape, head_v, dtype=torch.float32))
            partial_lse = made(query.new_empty(shape, dtype=torch.float32))
        stride_out = (*partial.stride()[-4:], partial.stride(0))
        stride_lse = (*partial_lse.stride()[-3:], partial_lse.stride(0))
        slopes = (0, 0) if alibi_slopes is None else (0, *alibi_slopes.stride())[-2:]
        tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        size = 0 if max(head, head_v) <= 64 else 1 if max(head, head_v) <= 128 else 2
        row = "fp32" if query.dtype == torch.float32 else "16-bit"
        launch(
            decode_kernel, (programs, splits),
            query, k_cache, v_cache, cache_seqlens, block_table, *angles, alibi_slopes,
            sinks if splits == 1 else None, partial, partial_lse,
            query.stride(), k_cache.stride(), v_cache.stride(), cache_seqlens.stride(0),
            stride_table, *stride_angles, slopes, stride_out, stride_lse,
            heads_k, heads // heads_k, seq_q, new, *sizes, left, right, splits, scale, softcap,
            LEFT=left >= 0, RIGHT=right >= 0, CAP=softcap > 0.0, SLOPES=alibi_slopes is not None,
            SINKS=sinks is not None and splits == 1,
            PRECISION="tf32" if tf32 and hardware.of(query).tf32 else "ieee",
            BLOCK_M=block_m, **CONFIGS[row][size]._asdict(), **common,
        )  # fmt: skip
        if splits > 1:
            combine(partial, partial_lse, sinks, out, lse)
    return out, lse
