"""The gradients of attention's bias and sinks, the same bits in every run, and what they need.

    dbias = dS, summed over the dimensions along which bias is broadcast
    dsink_h = -sum over b and i of exp(sink_h - lse) delta

Elements of these gradients show their row's roundings in full, and so does a query that sees a few
keys and a sink: `refine_kernel` makes delta exact before any gradient takes it.
A program owns elements of the gradient and walks over all that contributes to them, so that there
are no atomics and nothing quadratic besides bias itself: S and dP are computed once more, two
products. A bias of few elements leaves few programs; that is the price.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward import LINES, grad_scores, load_dlse, recomputed
from .attention_scores import LOG2_E, given
from .attention_tiles import (
    head_at,
    head_of,
    key_bounds,
    load,
    load_line,
    load_tile,
    plane_of,
    sequence,
    tiles_of,
)


@triton.jit(do_not_specialize=LINES)
def refine_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lines_ptr, bias_ptr, sinks_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr, dlse_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_bias, stride_slopes, stride_dlse,
    heads, group, planes, pitch, seq_q, seq_k, total_q, total_k, leftmost, rightmost,
    scale, softcap, threshold, kept,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS_ROWS: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta once more, of P and dP themselves (the one that lines hold is of the output, as it was
    rounded), in its place; and the share 1 / sum(P), which is 1 but for the rounding of lse."""
    tiles = tl.cdiv(seq_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if RIGHT:
        tile = tiles - 1 - tile
    batch, head = plane // heads, plane % heads
    start_m = tile * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    start_q, seq_q = sequence(cu_q_ptr, batch, seq_q)
    start_k, seq_k = sequence(cu_k_ptr, batch, seq_k)
    if cu_q_ptr is not None:
        leftmost, rightmost = leftmost + seq_k - seq_q, rightmost + seq_k - seq_q
        if start_m >= seq_q:
            return
    k_head = head_at(k_ptr, batch, head // group, start_k, stride_k)
    v_head = head_at(v_ptr, batch, head // group, start_k, stride_v)
    k_tiles = tiles_of(k_head, 1, 1, seq_k, stride_k, HEAD, DIM, BLOCK_N, DESCRIBED)
    v_tiles = tiles_of(v_head, 1, 1, seq_k, stride_v, HEAD_V, DIM_V, BLOCK_N, DESCRIBED)
    rows = start_m + offs_m
    q_head = head_at(q_ptr, batch, head, start_q, stride_q)
    q = load(q_head, start_m, offs_m, seq_q, stride_q, HEAD, DIM, True)
    do_head = head_at(do_ptr, batch, head, start_q, stride_do)
    do = load(do_head, start_m, offs_m, seq_q, stride_do, HEAD_V, DIM_V, True)
    line = plane_of(cu_q_ptr, batch, head, heads)
    lse = load_line(lines_ptr, line, start_q, start_m, offs_m, seq_q, pitch, float("inf"))
    delta = load_line(lines_ptr, planes + line, start_q, start_m, offs_m, seq_q, pitch, 0.0)
    bias_head = bias_ptr
    if bias_ptr is not None:
        bias_head = head_at(bias_ptr, batch, head, 0, stride_bias)
    slope = given(slopes_ptr, batch * stride_slopes[0] + head * stride_slopes[1])
    seed = given(seed_ptr, 0)

    total = tl.zeros([BLOCK_M], tl.float32)
    residue = tl.zeros([BLOCK_M], tl.float32)
    bounds = key_bounds(start_m, seq_k, leftmost, rightmost, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    for PART in tl.static_range(0 if LEFT else 1, 3):
        for start_n in range(bounds[PART], bounds[PART + 1], BLOCK_N):
            k = load_tile(k_tiles, 0, 0, start_n, offs_n, seq_k, stride_k, HEAD, DIM, PART != 1)
            v = load_tile(v_tiles, 0, 0, start_n, offs_n, seq_k, stride_v, HEAD_V, DIM_V, PART != 1)
            p, dp, slant = recomputed(
                q, k, v, do, lse, scale, softcap, slope, bias_head, stride_bias, seed, plane,
                start_m, offs_m, start_n, offs_n, seq_q, seq_k, leftmost, rightmost, threshold,
                kept, PART != 1, LEFT, RIGHT, SOFTCAP, slopes_ptr is not None, BIAS_ROWS,
                seed_ptr is not None, FOLD, PRECISION,
            )  # fmt: skip
            total += tl.sum(p, 1)
            residue += tl.sum(grad_scores(p, dp, delta[:, None], slant, False), 1)
    products = residue + delta * total
    if sinks_ptr is not None:
        total += tl.exp2((tl.load(sinks_ptr + head) - lse) * LOG2_E)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    dlse = load_dlse(dlse_ptr, batch, head, start_q, rows, seq_q, stride_dlse)
    ptr = lines_ptr + tl.cast(planes + line, tl.int64) * pitch + start_q
    tl.store(ptr + rows, products * share - dlse, mask=rows < seq_q)
    ptr = lines_ptr + tl.cast(2 * planes + line, tl.int64) * pitch + start_q
    tl.store(ptr + rows, share, mask=rows < seq_q)


@triton.jit(do_not_specialize=["batches", *LINES])
def grad_bias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lines_ptr, dbias_ptr, bias_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dbias, stride_bias, stride_slopes, batches,
    heads, group, planes, pitch, seq_q, seq_k, total_q, total_k, leftmost, rightmost,
    scale, softcap, threshold, kept,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS_ROWS: tl.constexpr,
    BIAS_BATCHES: tl.constexpr, BIAS_HEADS: tl.constexpr, BIAS_KEYS: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of bias's own rows and keys. Along a dimension in which bias differs
    (BIAS_*) that is a piece of it, along another one it walks over all."""
    tiles_n = tl.cdiv(seq_k, BLOCK_N) if BIAS_KEYS else 1
    tiles_m = tl.cdiv(seq_q, BLOCK_M) if BIAS_ROWS else 1
    plane, tile = tl.program_id(0) // (tiles_m * tiles_n), tl.program_id(0) % (tiles_m * tiles_n)
    own_m, own_n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
    own_head = plane % heads if BIAS_HEADS else 0
    own_batch = plane // (heads if BIAS_HEADS else 1)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    seed = given(seed_ptr, 0)
    left, right = leftmost, rightmost

    heads_k = heads // group
    q_tiles = tiles_of(q_ptr, batches, heads, seq_q, stride_q, HEAD, DIM, BLOCK_M, DESCRIBED)
    do_tiles = tiles_of(do_ptr, batches, heads, seq_q, stride_do, HEAD_V, DIM_V, BLOCK_M, DESCRIBED)
    k_tiles = tiles_of(k_ptr, batches, heads_k, seq_k, stride_k, HEAD, DIM, BLOCK_N, DESCRIBED)
    v_tiles = tiles_of(v_ptr, batches, heads_k, seq_k, stride_v, HEAD_V, DIM_V, BLOCK_N, DESCRIBED)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(own_batch, own_batch + 1 if BIAS_BATCHES else batches):
        start_q, size_q = sequence(cu_q_ptr, batch, seq_q)
        start_k, size_k = sequence(cu_k_ptr, batch, seq_k)
        if cu_q_ptr is not None:
            left, right = leftmost + size_k - size_q, rightmost + size_k - size_q
        last_m = tl.minimum(size_q, own_m + BLOCK_M) if BIAS_ROWS else size_q
        for head in range(own_head, own_head + 1 if BIAS_HEADS else heads):
            q_head = head_of(q_tiles, batch, head, start_q, stride_q)
            do_head = head_of(do_tiles, batch, head, start_q, stride_do)
            k_head = head_of(k_tiles, batch, head // group, start_k, stride_k)
            v_head = head_of(v_tiles, batch, head // group, start_k, stride_v)
            plane_q = batch * heads + head
            line = plane_of(cu_q_ptr, batch, head, heads)
            bias_head = head_at(bias_ptr, batch, head, 0, stride_bias)
            slope = given(slopes_ptr, batch * stride_slopes[0] + head * stride_slopes[1])
            for start_m in range(own_m, last_m, BLOCK_M):
                q = load_tile(
                    q_head, batch, head, start_m, offs_m, size_q, stride_q, HEAD, DIM, True
                )
                do = load_tile(
                    do_head, batch, head, start_m, offs_m, size_q, stride_do, HEAD_V, DIM_V, True
                )
                lse = load_line(
                    lines_ptr, line, start_q, start_m, offs_m, size_q, pitch, float("inf")
                )
                delta = load_line(
                    lines_ptr, planes + line, start_q, start_m, offs_m, size_q, pitch, 0.0
                )
                share = load_line(
                    lines_ptr, 2 * planes + line, start_q, start_m, offs_m, size_q, pitch, 0.0
                )
                bounds = key_bounds(start_m, size_k, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
                first_n, last_n = bounds[0], bounds[3]
                if BIAS_KEYS:
                    first_n = tl.maximum(first_n, own_n)
                    last_n = tl.minimum(last_n, own_n + BLOCK_N)
                for start_n in range(first_n, last_n, BLOCK_N):
                    k = load_tile(
                        k_head, batch, head // group, start_n, offs_n, size_k, stride_k,
                        HEAD, DIM, True,
                    )  # fmt: skip
                    v = load_tile(
                        v_head, batch, head // group, start_n, offs_n, size_k, stride_v,
                        HEAD_V, DIM_V, True,
                    )  # fmt: skip
                    p, dp, slant = recomputed(
                        q, k, v, do, lse, scale, softcap, slope, bias_head, stride_bias, seed,
                        plane_q, start_m, offs_m, start_n, offs_n, size_q, size_k, left, right,
                        threshold, kept, True, LEFT, RIGHT, SOFTCAP, slopes_ptr is not None,
                        BIAS_ROWS, seed_ptr is not None, FOLD, PRECISION,
                    )  # fmt: skip
                    # What is added after the cap does not go through its derivative.
                    acc += grad_scores(p * share[:, None], dp, delta[:, None], slant, False)
    tile_ptr = head_at(dbias_ptr, own_batch, own_head, own_m, stride_dbias)
    tile_ptr += tl.cast(own_n, tl.int64) * stride_dbias[3]
    rows, keys = seq_q - own_m, seq_k - own_n
    if not BIAS_ROWS:
        acc = tl.sum(acc, 0, keep_dims=True)
        offs_m, rows = tl.arange(0, 1), 1
    if not BIAS_KEYS:
        acc = tl.sum(acc, 1, keep_dims=True)
        offs_n, keys = tl.arange(0, 1), 1
    mask = (offs_m[:, None] < rows) & (offs_n[None, :] < keys)
    tile_ptr = tile_ptr + offs_m[:, None] * stride_dbias[2] + offs_n[None, :] * stride_dbias[3]
    tl.store(tile_ptr, acc.to(dbias_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batches", *LINES])
def grad_sinks_kernel(
    lines_ptr, sinks_ptr, dsinks_ptr, batches, heads, planes, pitch, total_q, BLOCK_M: tl.constexpr
):
    """A program owns a head. packed: one batch, all of whose rows are in line."""
    head = tl.program_id(0)
    sink = tl.load(sinks_ptr + head)
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M], tl.float32)
    for batch in range(batches):
        line = batch * heads + head
        for start_m in range(0, total_q, BLOCK_M):
            lse = load_line(lines_ptr, line, 0, start_m, offs_m, total_q, pitch, float("inf"))
            delta = load_line(lines_ptr, planes + line, 0, start_m, offs_m, total_q, pitch, 0.0)
            # delta of a row that is in no sequence may be anything.
            p = tl.exp2((sink - lse) * LOG2_E)
            acc -= tl.where(lse == float("inf"), 0.0, p * delta)
    tl.store(dsinks_ptr + head, tl.sum(acc, 0))
