"""Attention forward: out = softmax(scores) V and lse, without a quadratic tensor.

A program owns a tile of queries, walks over the keys that they see and keeps a running maximum and
sum per row (online softmax), so that only out and lse reach memory. FlashAttention-2 (Dao, 2023,
arXiv:2307.08691, algorithm 1) is the plan: out is divided by the sum once, at the end.

A sink is one more score in the sum, with no value: the row that starts from it has seen it.
Products of fp8 take P in e4m3, whose numbers end at 2^-9: P is scaled by 2^8 on its way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import LN_2, LOG2_E, given, scores_of
from .attention_tiles import (
    clear_outside,
    head_at,
    key_bounds,
    line_at,
    load,
    load_tile,
    sequence,
    store,
    tiles_of,
    within,
)
from .philox import keep_mask
from .products import add_product

# Not worth a recompilation when they happen to be 1 or a multiple of 16.
SIZES = [
    "heads", "group", "seq_q", "seq_k", "total_q", "total_k", "leftmost", "rightmost", "threshold"
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, sinks_ptr, slopes_ptr, seed_ptr,
    q_descale_ptr, k_descale_ptr, v_descale_ptr, cu_q_ptr, cu_k_ptr,
    stride_q, stride_k, stride_v, stride_out, stride_bias, stride_slopes,
    heads, group, seq_q, seq_k, total_q, total_k, leftmost, rightmost,
    scale, softcap, threshold, kept,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS_ROWS: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if RIGHT:
        # The last queries see the most keys: started first, they leave no long tail.
        tile = tiles - 1 - tile
    batch, head = plane // heads, plane % heads
    start_m = tile * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if cu_q_ptr is not None:
        batches = tl.num_programs(0) // tiles // heads
        whole_out = head_at(out_ptr, batch, head, 0, stride_out)
        whole_lse = line_at(lse_ptr, cu_q_ptr, batch, head, heads, 0, total_q)
        clear_outside(
            whole_out, cu_q_ptr, tile, batch, batches, total_q, stride_out, 0.0,
            HEAD_V, DIM_V, BLOCK_M,
        )  # fmt: skip
        clear_outside(
            whole_lse, cu_q_ptr, tile, batch, batches, total_q, (0, 0, 1, 0), float("-inf"),
            1, 1, BLOCK_M,
        )  # fmt: skip
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
    bias_head = bias_ptr
    if bias_ptr is not None:
        bias_head = head_at(bias_ptr, batch, head, 0, stride_bias)
    slope = given(slopes_ptr, batch * stride_slopes[0] + head * stride_slopes[1])
    seed = given(seed_ptr, 0)
    plane_k = batch * (heads // group) + head // group
    if q_descale_ptr is not None:
        scale = scale * tl.load(q_descale_ptr + plane_k)
    if k_descale_ptr is not None:
        scale = scale * tl.load(k_descale_ptr + plane_k)
    # Folded, row_max is in units of log2(e): it commutes with the (positive) factor, so that the
    # maximum is taken of the bare products.
    factor = scale * LOG2_E
    FP8: tl.constexpr = v_ptr.dtype.element_ty == tl.float8e4nv
    P_BITS: tl.constexpr = 8.0 if FP8 else 0.0

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head)
        row_max = tl.full([BLOCK_M], 0.0, tl.float32) + (sink * LOG2_E if FOLD else sink)
        row_sum = tl.full([BLOCK_M], 256.0 if FP8 else 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_V], tl.float32)
    bounds = key_bounds(start_m, seq_k, leftmost, rightmost, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    # Before the keys that all queries see, among them, and after them.
    for PART in tl.static_range(0 if LEFT else 1, 3):
        for start_n in range(bounds[PART], bounds[PART + 1], BLOCK_N):
            k = load_tile(k_tiles, 0, 0, start_n, offs_n, seq_k, stride_k, HEAD, DIM, PART != 1)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores, _ = scores_of(
                products, scale, softcap, slope, bias_head, stride_bias,
                start_m, offs_m[:, None], start_n, offs_n[None, :], seq_q, seq_k,
                SOFTCAP, slopes_ptr is not None, BIAS_ROWS, FOLD, q.dtype == tl.float32,
            )  # fmt: skip
            if PART != 1:
                keys = (start_n + offs_n)[None, :]
                seen = keys < seq_k
                if LEFT or RIGHT:
                    rows = (start_m + offs_m)[:, None]
                    seen = seen & within(rows, keys, leftmost, rightmost, LEFT, RIGHT)
                scores = tl.where(seen, scores, float("-inf"))
            top = tl.max(scores, 1)
            new_max = tl.maximum(row_max, top * factor if FOLD else top)
            # A row that has seen nothing yet must not compute inf - inf.
            shift = new_max
            if PART != 1 or bias_ptr is not None:
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            if FOLD:
                p = tl.exp2(scores * factor - (shift - P_BITS)[:, None])
                alpha = tl.exp2(row_max - shift)
            else:
                p = tl.exp2((scores - (shift - P_BITS * LN_2)[:, None]) * LOG2_E)
                alpha = tl.exp2((row_max - shift) * LOG2_E)
            row_max = new_max
            row_sum = row_sum * alpha + tl.sum(p, 1)
            if seed_ptr is not None:
                keep = keep_mask(seed, start_m + offs_m, start_n, plane, threshold, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = load_tile(v_tiles, 0, 0, start_n, offs_n, seq_k, stride_v, HEAD_V, DIM_V, PART != 1)
            acc = add_product(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)

    # A row that saw nothing has row_max -inf, or its sink, and acc 0: its lse and its output.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    rows = start_m + offs_m
    lse = (row_max * LN_2 if FOLD else row_max) + (tl.log2(row_sum) - P_BITS) * LN_2
    lse_line = line_at(lse_ptr, cu_q_ptr, batch, head, heads, start_q, total_q)
    tl.store(lse_line + rows, lse, mask=rows < seq_q)
    acc = acc / row_sum[:, None]
    if seed_ptr is not None:
        acc = acc * kept
    if v_descale_ptr is not None:
        acc = acc * tl.load(v_descale_ptr + plane_k)
    out_head = head_at(out_ptr, batch, head, start_q, stride_out)
    store(out_head, start_m, offs_m, seq_q, stride_out, acc, HEAD_V, DIM_V)
