"""Attention's gradients with respect to query, key and value, and what they share.

The backward pass recomputes P from lse. With M dropout's factors, delta = rowsum(dO * O) - dlse,

    dV = (P M)^T dO,  dP = M (dO V^T),  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q,

where dS has gone through the cap's derivative before the last two.

FlashAttention-2 (Dao, 2023, algorithm 2) adds dQ up with atomics. Here dK and dV are one kernel (a
program owns a tile of keys and walks over the queries of every head that reads them) and dQ is
another (a program owns a tile of queries): two products more in exchange for the same bits in every
run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_forward import SIZES
from .attention_scores import given, probability, scores_of
from .attention_tiles import (
    clear_outside,
    head_at,
    head_of,
    key_bounds,
    lines_of,
    load,
    load_line,
    load_tile,
    plane_of,
    query_bounds,
    sequence,
    store,
    tiles_of,
    within,
)
from .philox import keep_mask
from .products import add_product

# What rows have one number each of lies in `planes` lines, `pitch` apart (a multiple of 16 bytes):
# first lse (+inf of a row that sees nothing: its P is 0), then delta, and where it is asked for the
# share of `refine_kernel`.
LINES = ["planes", "pitch", *SIZES]


@triton.jit(do_not_specialize=LINES)
def delta_kernel(
    out_ptr, do_ptr, lse_ptr, dlse_ptr, lines_ptr, stride_out, stride_do, stride_dlse,
    heads, planes, pitch, total_q,
    HEAD_V: tl.constexpr, DIM_V: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse's and delta's lines. The sums are the diagonal of a product: they add up in the order in
    which dP does, so that a row which sees one key gets dP - delta = 0 and not the difference of
    two roundings."""
    tiles = tl.cdiv(total_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = plane // heads, plane % heads
    start_m = tile * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    out_head = head_at(out_ptr, batch, head, 0, stride_out)
    do_head = head_at(do_ptr, batch, head, 0, stride_do)
    out = load(out_head, start_m, offs_m, total_q, stride_out, HEAD_V, DIM_V, True)
    do = load(do_head, start_m, offs_m, total_q, stride_do, HEAD_V, DIM_V, True)
    products = tl.dot(do, tl.trans(out), input_precision=PRECISION)
    delta = tl.sum(tl.where(offs_m[:, None] == offs_m[None, :], products, 0.0), 1)
    rows = start_m + offs_m
    delta -= load_dlse(dlse_ptr, batch, head, 0, rows, total_q, stride_dlse)
    lse = tl.load(lse_ptr + plane.to(tl.int64) * total_q + rows, mask=rows < total_q, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    line = lines_ptr + plane.to(tl.int64) * pitch
    tl.store(line + rows, lse, mask=rows < total_q)
    tl.store(line + tl.cast(planes, tl.int64) * pitch + rows, delta, mask=rows < total_q)


@triton.jit
def load_dlse(ptr, batch, head, start, rows, size, stride):
    """lse's gradient at the rows of a head; 0 if there is none."""
    value = tl.zeros([rows.shape[0]], tl.float32)
    if ptr is not None:
        line = head_at(ptr, batch, head, start, stride)
        value = tl.load(line + rows.to(tl.int64) * stride[2], mask=rows < size, other=0.0)
    return value


@triton.jit
def grad_scores(p, dp, delta, slant, SOFTCAP: tl.constexpr):
    """The gradients of what the softmax takes; with SOFTCAP of what is capped."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * slant
    return ds


@triton.jit
def recomputed(
    q, k, v, do, lse, scale, softcap, slope, bias_head, stride_bias, seed, plane,
    start_m, offs_m, start_n, offs_n, seq_q, seq_k, leftmost, rightmost, threshold, kept,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS_ROWS: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dP of a tile, queries by keys, and the derivative of the cap. MASK: some of the keys
    may be hidden from some of the rows, or not be there."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores, slant = scores_of(
        products, scale, softcap, slope, bias_head, stride_bias,
        start_m, offs_m[:, None], start_n, offs_n[None, :], seq_q, seq_k,
        SOFTCAP, ALIBI, BIAS_ROWS, FOLD, q.dtype == tl.float32,
    )  # fmt: skip
    p = probability(scores, scale, lse[:, None], FOLD)
    rows = start_m + offs_m
    if MASK:
        keys = (start_n + offs_n)[None, :]
        seen = keys < seq_k
        if LEFT or RIGHT:
            seen = seen & within(rows[:, None], keys, leftmost, rightmost, LEFT, RIGHT)
        p = tl.where(seen, p, 0.0)
    keep = p
    if DROPOUT:
        keep = keep_mask(seed, rows, start_n, plane, threshold, offs_n.shape[0])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(keep, dp * kept, 0.0)
    return p, dp, slant


@triton.jit(do_not_specialize=LINES)
def grad_query_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lines_ptr, dq_ptr, bias_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dq, stride_bias, stride_slopes,
    heads, group, planes, pitch, seq_q, seq_k, total_q, total_k, leftmost, rightmost,
    scale, softcap, threshold, kept,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS_ROWS: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if RIGHT:
        tile = tiles - 1 - tile
    batch, head = plane // heads, plane % heads
    start_m = tile * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if cu_q_ptr is not None:
        batches = tl.num_programs(0) // tiles // heads
        whole = head_at(dq_ptr, batch, head, 0, stride_dq)
        clear_outside(
            whole, cu_q_ptr, tile, batch, batches, total_q, stride_dq, 0.0, HEAD, DIM, BLOCK_M
        )
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

    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
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
            ds = grad_scores(p, dp, delta[:, None], slant, SOFTCAP)
            acc = add_product(ds.to(k.dtype), k, acc, PRECISION)
    dq_head = head_at(dq_ptr, batch, head, start_q, stride_dq)
    store(dq_head, start_m, offs_m, seq_q, stride_dq, acc * scale, HEAD, DIM)


@triton.jit(do_not_specialize=LINES)
def grad_key_value_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lines_ptr, dk_ptr, dv_ptr,
    bias_ptr, slopes_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv, stride_bias, stride_slopes,
    heads, group, planes, pitch, seq_q, seq_k, total_q, total_k, leftmost, rightmost,
    scale, softcap, threshold, kept,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS_ROWS: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEEDS_KEY: tl.constexpr, NEEDS_VALUE: tl.constexpr,
):  # fmt: skip
    """All products are transposed, keys by queries: P^T and dS^T feed the next one as they are."""
    tiles = tl.cdiv(seq_k, BLOCK_N)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    heads_k = heads // group
    batch, head_k = plane // heads_k, plane % heads_k
    start_n = tile * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if cu_k_ptr is not None:
        batches = tl.num_programs(0) // tiles // heads_k
        if NEEDS_KEY:
            whole = head_at(dk_ptr, batch, head_k, 0, stride_dk)
            clear_outside(
                whole, cu_k_ptr, tile, batch, batches, total_k, stride_dk, 0.0, HEAD, DIM, BLOCK_N
            )
        if NEEDS_VALUE:
            whole = head_at(dv_ptr, batch, head_k, 0, stride_dv)
            clear_outside(
                whole, cu_k_ptr, tile, batch, batches, total_k, stride_dv, 0.0,
                HEAD_V, DIM_V, BLOCK_N,
            )  # fmt: skip
    start_q, seq_q = sequence(cu_q_ptr, batch, seq_q)
    start_k, seq_k = sequence(cu_k_ptr, batch, seq_k)
    if cu_k_ptr is not None:
        leftmost, rightmost = leftmost + seq_k - seq_q, rightmost + seq_k - seq_q
        if start_n >= seq_k:
            return
    k_head = head_at(k_ptr, batch, head_k, start_k, stride_k)
    k = load(k_head, start_n, offs_n, seq_k, stride_k, HEAD, DIM, True)
    if NEEDS_KEY:
        v_head = head_at(v_ptr, batch, head_k, start_k, stride_v)
        v = load(v_head, start_n, offs_n, seq_k, stride_v, HEAD_V, DIM_V, True)
    seed = given(seed_ptr, 0)

    # Keys past the end need no mask: only rows of dK and dV that are never stored depend on them.
    # A loop without masks besides takes registers, which addresses need where there are any.
    MASKED: tl.constexpr = LEFT or RIGHT
    SPLIT: tl.constexpr = DESCRIBED and RIGHT and not LEFT and DIM + DIM_V <= 128
    bounds = query_bounds(start_n, seq_q, leftmost, rightmost, LEFT, RIGHT, SPLIT, BLOCK_M, BLOCK_N)
    first = head_k * group
    q_group = head_at(q_ptr, batch, first, start_q, stride_q)
    do_group = head_at(do_ptr, batch, first, start_q, stride_do)
    q_tiles = tiles_of(q_group, 1, group, seq_q, stride_q, HEAD, DIM, BLOCK_M, DESCRIBED)
    do_tiles = tiles_of(do_group, 1, group, seq_q, stride_do, HEAD_V, DIM_V, BLOCK_M, DESCRIBED)
    # Packed, a sequence may begin between multiples of 16 bytes.
    lines = lines_of(lines_ptr, 2 * planes, seq_q, pitch, BLOCK_M, DESCRIBED and cu_q_ptr is None)
    dk = tl.zeros([BLOCK_N, DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, DIM_V], tl.float32)
    for head in range(first, first + group):
        q_head = head_of(q_tiles, 0, head - first, 0, stride_q)
        do_head = head_of(do_tiles, 0, head - first, 0, stride_do)
        line = plane_of(cu_q_ptr, batch, head, heads)
        bias_head = bias_ptr
        if bias_ptr is not None:
            bias_head = head_at(bias_ptr, batch, head, 0, stride_bias)
        slope = given(slopes_ptr, batch * stride_slopes[0] + head * stride_slopes[1])
        for PART in tl.static_range(0 if MASKED else 1, 2 if SPLIT or not MASKED else 1):
            for start_m in range(bounds[PART], bounds[PART + 1], BLOCK_M):
                rows = start_m + offs_m
                q = load_tile(
                    q_head, 0, head - first, start_m, offs_m, seq_q, stride_q, HEAD, DIM, True
                )
                do = load_tile(
                    do_head, 0, head - first, start_m, offs_m, seq_q, stride_do, HEAD_V, DIM_V, True
                )
                products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                scores, slant = scores_of(
                    products, scale, softcap, slope, bias_head, stride_bias,
                    start_m, offs_m[None, :], start_n, offs_n[:, None], seq_q, seq_k,
                    SOFTCAP, slopes_ptr is not None, BIAS_ROWS, FOLD, q.dtype == tl.float32,
                )  # fmt: skip
                lse = load_line(lines, line, start_q, start_m, offs_m, seq_q, pitch, float("inf"))
                p = probability(scores, scale, lse[None, :], FOLD)
                if PART == 0:
                    keys = (start_n + offs_n)[:, None]
                    p = tl.where(
                        within(rows[None, :], keys, leftmost, rightmost, LEFT, RIGHT), p, 0.0
                    )
                keep = p
                if seed_ptr is not None:
                    keep = keep_mask(seed, rows, start_n, batch * heads + head, threshold, BLOCK_N)
                    # As numbers: on AMD, Triton does not transpose single bits into a product.
                    keep = tl.trans(keep.to(tl.float16)).to(tl.float32)
                if NEEDS_VALUE:
                    dropped = p
                    if seed_ptr is not None:
                        dropped = p * keep
                    dv = add_product(dropped.to(do.dtype), do, dv, PRECISION)
                if NEEDS_KEY:
                    delta = load_line(
                        lines, planes + line, start_q, start_m, offs_m, seq_q, pitch, 0.0
                    )
                    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                    if seed_ptr is not None:
                        dp = dp * (keep * kept)
                    ds = grad_scores(p, dp, delta[None, :], slant, SOFTCAP)
                    dk = add_product(ds.to(q.dtype), q, dk, PRECISION)
    if NEEDS_KEY:
        dk_head = head_at(dk_ptr, batch, head_k, start_k, stride_dk)
        store(dk_head, start_n, offs_n, seq_k, stride_dk, dk * scale, HEAD, DIM)
    if NEEDS_VALUE:
        if seed_ptr is not None:
            dv = dv * kept
        dv_head = head_at(dv_ptr, batch, head_k, start_k, stride_dv)
        store(dv_head, start_n, offs_n, seq_k, stride_dv, dv, HEAD_V, DIM_V)
