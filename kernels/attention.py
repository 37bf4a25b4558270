"""Attention, forward and backward, without a quadratic tensor.

    S = scale * Q K^T,  P = softmax(S),  O = P V,  lse = log(sum(exp(S)))

A program owns a tile of queries, walks over the keys and keeps a running maximum and sum per row
(online softmax), so that only O and lse reach memory. FlashAttention-2 (Dao, 2023,
arXiv:2307.08691, algorithms 1 and 2) is the plan: O is divided by the sum once, at the end; the
exponential is exp2 with log2(e) folded into the scale, one FMA per score; blocks that the diagonal
hides are never visited and only the blocks that it cuts are masked.

That FMA rounds scores and lse in units of log2(e), which 16 bits do not notice. For fp32 (and for
a negative scale) FOLD is off: the large terms cancel first, a product more per score.

The backward pass recomputes P from lse. With delta = rowsum(dO * O) - dlse,

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.

FlashAttention-2 adds dQ up with atomics. Here dK and dV are one kernel (a program owns a tile of
keys and walks over the queries of every head that reads them) and dQ is another (a program owns a
tile of queries): two products more in exchange for the same bits in every run.

Key j is seen by query i iff j <= i + diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import hardware
from .launch import launch, made, replayed
from .products import add_product

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))

# Not worth a recompilation when they happen to be 1 or a multiple of 16.
SIZES = ["heads", "group", "seq_q", "seq_k", "diagonal"]


@triton.jit
def _head(ptr, batch, head, stride):
    """The address of one head; 64-bit, because a tensor may hold more than 2^31 elements."""
    return ptr + batch.to(tl.int64) * stride[0] + tl.cast(head, tl.int64) * stride[1]


@triton.jit
def _load(
    ptr, start, rows, size, stride, WIDTH: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr
):
    """Rows start + rows of a head, DIM wide: zero from column WIDTH and, if TAIL, from row size.

    Offsets within a tile are 32-bit: the launcher copies a tensor whose strides do not allow it.
    """
    cols = tl.arange(0, DIM)
    tile = ptr + tl.cast(start, tl.int64) * stride[2]
    tile = tile + rows[:, None] * stride[2] + cols[None, :] * stride[3]
    if TAIL:
        mask = (rows[:, None] < size - start) & (cols[None, :] < WIDTH)
        return tl.load(tile, mask=mask, other=0.0)
    if WIDTH < DIM:
        return tl.load(tile, mask=cols[None, :] < WIDTH, other=0.0)
    return tl.load(tile)


@triton.jit
def _store(ptr, start, rows, size, stride, value, WIDTH: tl.constexpr, DIM: tl.constexpr):
    cols = tl.arange(0, DIM)
    tile = ptr + tl.cast(start, tl.int64) * stride[2]
    tile = tile + rows[:, None] * stride[2] + cols[None, :] * stride[3]
    mask = (rows[:, None] < size - start) & (cols[None, :] < WIDTH)
    tl.store(tile, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _key_range(
    start_m, seq_k, diagonal, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Keys below full (whole blocks) are seen by all queries of the tile, from end on by none."""
    full, end = seq_k, seq_k
    if CAUSAL:
        full = tl.minimum(seq_k, tl.maximum(0, start_m + diagonal + 1))
        end = tl.minimum(seq_k, tl.maximum(0, start_m + diagonal + BLOCK_M))
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def _seen(rows, keys, seq_k, diagonal, CAUSAL: tl.constexpr):
    seen = (keys < seq_k)[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= (rows + diagonal)[:, None])
    return seen


@triton.jit
def _load_lse(ptr, rows, size):
    """A row that sees no key (-inf) or does not exist gets +inf: its P is 0."""
    lse = tl.load(ptr + rows, mask=rows < size, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _probability(scores, scale, lse, FOLD: tl.constexpr):
    if FOLD:
        return tl.exp2(scores * (scale * LOG2_E) - lse * LOG2_E)
    return tl.exp2((scores * scale - lse) * LOG2_E)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_q, stride_k, stride_v, stride_out,
    heads, group, seq_q, seq_k, diagonal, scale,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CAUSAL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:
        # The last queries see the most keys: started first, they leave no long tail.
        tile = tiles - 1 - tile
    batch, head = plane // heads, plane % heads
    k_head = _head(k_ptr, batch, head // group, stride_k)
    v_head = _head(v_ptr, batch, head // group, stride_v)
    start_m = tile * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q = _load(
        _head(q_ptr, batch, head, stride_q), start_m, offs_m, seq_q, stride_q, HEAD, DIM, True
    )
    # Folded, row_max is in units of log2(e): it commutes with the (positive) factor, so that the
    # maximum is taken of the bare products.
    factor = scale * LOG2_E

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_V], tl.float32)
    full, end = _key_range(start_m, seq_k, diagonal, CAUSAL, BLOCK_M, BLOCK_N)
    for MASKED in tl.static_range(2):
        for start_n in range(full if MASKED else 0, end if MASKED else full, BLOCK_N):
            k = _load(k_head, start_n, offs_n, seq_k, stride_k, HEAD, DIM, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if not FOLD:
                scores = scores * scale
            if MASKED:
                seen = _seen(start_m + offs_m, start_n + offs_n, seq_k, diagonal, CAUSAL)
                scores = tl.where(seen, scores, float("-inf"))
            top = tl.max(scores, 1)
            new_max = tl.maximum(row_max, top * factor if FOLD else top)
            # A row that has seen nothing yet must not compute inf - inf.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
            if FOLD:
                p = tl.exp2(scores * factor - shift[:, None])
                alpha = tl.exp2(row_max - shift)
            else:
                p = tl.exp2((scores - shift[:, None]) * LOG2_E)
                alpha = tl.exp2((row_max - shift) * LOG2_E)
            row_max = new_max
            row_sum = row_sum * alpha + tl.sum(p, 1)
            v = _load(v_head, start_n, offs_n, seq_k, stride_v, HEAD_V, DIM_V, MASKED)
            acc = add_product(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)

    # A row that saw nothing has row_max -inf and acc 0, which are its lse and its output.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    rows = start_m + offs_m
    lse = (row_max * LN_2 if FOLD else row_max) + tl.log2(row_sum) * LN_2
    tl.store(lse_ptr + plane.to(tl.int64) * seq_q + rows, lse, mask=rows < seq_q)
    out_head = _head(out_ptr, batch, head, stride_out)
    _store(out_head, start_m, offs_m, seq_q, stride_out, acc / row_sum[:, None], HEAD_V, DIM_V)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out_ptr, do_ptr, dlse_ptr, delta_ptr, stride_out, stride_do, stride_dlse, heads, seq_q,
    HEAD_V: tl.constexpr, DIM_V: tl.constexpr, HAS_DLSE: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For fp32 the sums are the diagonal of a product: they add up in the order in which dP does,
    so that a row which sees one key gets dP - delta = 0 and not the difference of two roundings."""
    tiles = tl.cdiv(seq_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = plane // heads, plane % heads
    start_m = tile * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    out_head = _head(out_ptr, batch, head, stride_out)
    do_head = _head(do_ptr, batch, head, stride_do)
    out = _load(out_head, start_m, offs_m, seq_q, stride_out, HEAD_V, DIM_V, True)
    do = _load(do_head, start_m, offs_m, seq_q, stride_do, HEAD_V, DIM_V, True)
    if FOLD:
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    else:
        products = tl.dot(do, tl.trans(out), input_precision=PRECISION)
        delta = tl.sum(tl.where(offs_m[:, None] == offs_m[None, :], products, 0.0), 1)
    rows = start_m + offs_m
    if HAS_DLSE:
        dlse_head = _head(dlse_ptr, batch, head, stride_dlse)
        delta -= tl.load(
            dlse_head + rows.to(tl.int64) * stride_dlse[2], mask=rows < seq_q, other=0.0
        )
    tl.store(delta_ptr + plane.to(tl.int64) * seq_q + rows, delta, mask=rows < seq_q)


@triton.jit(do_not_specialize=SIZES)
def grad_query_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dq,
    heads, group, seq_q, seq_k, diagonal, scale,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CAUSAL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK_M)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    batch, head = plane // heads, plane % heads
    k_head = _head(k_ptr, batch, head // group, stride_k)
    v_head = _head(v_ptr, batch, head // group, stride_v)
    start_m = tile * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = start_m + offs_m
    q = _load(
        _head(q_ptr, batch, head, stride_q), start_m, offs_m, seq_q, stride_q, HEAD, DIM, True
    )
    do_head = _head(do_ptr, batch, head, stride_do)
    do = _load(do_head, start_m, offs_m, seq_q, stride_do, HEAD_V, DIM_V, True)
    lse = _load_lse(lse_ptr + plane.to(tl.int64) * seq_q, rows, seq_q)
    delta = tl.load(delta_ptr + plane.to(tl.int64) * seq_q + rows, mask=rows < seq_q, other=0.0)

    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    full, end = _key_range(start_m, seq_k, diagonal, CAUSAL, BLOCK_M, BLOCK_N)
    for MASKED in tl.static_range(2):
        for start_n in range(full if MASKED else 0, end if MASKED else full, BLOCK_N):
            k = _load(k_head, start_n, offs_n, seq_k, stride_k, HEAD, DIM, MASKED)
            v = _load(v_head, start_n, offs_n, seq_k, stride_v, HEAD_V, DIM_V, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = _probability(scores, scale, lse[:, None], FOLD)
            if MASKED:
                p = tl.where(_seen(rows, start_n + offs_n, seq_k, diagonal, CAUSAL), p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            acc = add_product(ds, k, acc, PRECISION)
    dq_head = _head(dq_ptr, batch, head, stride_dq)
    _store(dq_head, start_m, offs_m, seq_q, stride_dq, acc * scale, HEAD, DIM)


@triton.jit(do_not_specialize=SIZES)
def grad_key_value_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv,
    heads, group, seq_q, seq_k, diagonal, scale,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CAUSAL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEEDS_KEY: tl.constexpr, NEEDS_VALUE: tl.constexpr,
):  # fmt: skip
    """All products are transposed, keys by queries: P^T and dS^T feed the next one as they are."""
    tiles = tl.cdiv(seq_k, BLOCK_N)
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head_k = plane // (heads // group), plane % (heads // group)
    start_n = tile * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_head = _head(k_ptr, batch, head_k, stride_k)
    k = _load(k_head, start_n, offs_n, seq_k, stride_k, HEAD, DIM, True)
    if NEEDS_KEY:
        v_head = _head(v_ptr, batch, head_k, stride_v)
        v = _load(v_head, start_n, offs_n, seq_k, stride_v, HEAD_V, DIM_V, True)

    # Queries before first see none of the tile's keys. Keys past the end need no mask: only rows of
    # dK and dV that are never stored depend on them.
    first = 0
    if CAUSAL:
        first = tl.maximum(0, start_n - diagonal) // BLOCK_M * BLOCK_M
    dk = tl.zeros([BLOCK_N, DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, DIM_V], tl.float32)
    for head in range(head_k * group, head_k * group + group):
        plane_q = (batch * heads + head).to(tl.int64)
        q_head = _head(q_ptr, batch, head, stride_q)
        do_head = _head(do_ptr, batch, head, stride_do)
        # One loop: a second, unmasked one for the blocks below the diagonal spills registers.
        for start_m in range(first, seq_q, BLOCK_M):
            rows = start_m + offs_m
            q = _load(q_head, start_m, offs_m, seq_q, stride_q, HEAD, DIM, True)
            do = _load(do_head, start_m, offs_m, seq_q, stride_do, HEAD_V, DIM_V, True)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            lse = _load_lse(lse_ptr + plane_q * seq_q, rows, seq_q)
            p = _probability(scores, scale, lse[None, :], FOLD)
            if CAUSAL:
                seen = (start_n + offs_n)[:, None] <= (rows + diagonal)[None, :]
                p = tl.where(seen, p, 0.0)
            if NEEDS_VALUE:
                dv = add_product(p.to(do.dtype), do, dv, PRECISION)
            if NEEDS_KEY:
                delta = tl.load(delta_ptr + plane_q * seq_q + rows, mask=rows < seq_q, other=0.0)
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                ds = (p * (dp - delta[None, :])).to(q.dtype)
                dk = add_product(ds, q, dk, PRECISION)
    if NEEDS_KEY:
        dk_head = _head(dk_ptr, batch, head_k, stride_dk)
        _store(dk_head, start_n, offs_n, seq_k, stride_dk, dk * scale, HEAD, DIM)
    if NEEDS_VALUE:
        dv_head = _head(dv_ptr, batch, head_k, stride_dv)
        _store(dv_head, start_n, offs_n, seq_k, stride_dv, dv, HEAD_V, DIM_V)


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# By head size: up to 64, 128, 256. Chosen so that nothing spills (ledger/attention.txt) and
# two stages of tiles fit the shared memory: 99 KB (sm_86, sm_89, sm_120), 163 (sm_80), 227.
# - 8 warps nearly everywhere: the accumulators (BLOCK_M x head size, twice for dK and dV) take 64
#   or 128 registers of a thread's 255 and the scores of a 128 x 64 tile 32 more.
# - On sm_90 a wgmma needs 64 rows for each 4 warps: 128 rows, and long rows of keys to feed it. Up
#   to head size 64 two programs share an SM: one's softmax hides behind the other's wgmma.
# - On sm_100 scores and accumulators come from tensor memory through registers: shorter key tiles.
# - IEEE products of fp32 run on the CUDA cores, whose threads hold rows of a tile in registers
#   along the whole head: small tiles, the same everywhere.
CONFIGS = {
    ("forward", "sm80"): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("forward", "sm86"): (Config(128, 64, 4, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward", "sm90"): (Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 32, 8, 3)),
    ("forward", "sm100"): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("forward", "fp32"): (Config(64, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 1)),
    ("grad_query", "sm80"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    ("grad_query", "sm86"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    ("grad_query", "sm90"): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
    ("grad_query", "sm100"): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
    ("grad_query", "fp32"): (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 2)),
    ("grad_key_value", "sm80"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 2)
    ),
    ("grad_key_value", "sm86"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 2)
    ),
    ("grad_key_value", "sm90"): (
        Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 128, 8, 2)
    ),
    ("grad_key_value", "sm100"): (
        Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 1)
    ),
    ("grad_key_value", "fp32"): (
        Config(32, 32, 8, 2), Config(16, 32, 8, 1), Config(16, 16, 8, 1)
    ),
}  # fmt: skip


def config_row(tensor: torch.Tensor) -> str:
    here = hardware.of(tensor)
    if here.interpreted:
        return "sm90"  # the largest tiles are the fewest steps
    if tensor.dtype == torch.float32:
        return "fp32"
    if here.arch in ("sm_80", "sm_87"):
        return "sm80"
    return {"sm_9": "sm90", "sm_10": "sm100"}.get(here.arch[:-1], "sm86")


def _config(kernel: str, query: torch.Tensor, value: torch.Tensor) -> dict[str, int]:
    head = max(query.shape[3], value.shape[3])
    size = 0 if head <= 64 else 1 if head <= 128 else 2
    return CONFIGS[kernel, config_row(query)][size]._asdict()


def _common(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    diagonal: int | None,
    scale: float,
) -> dict[str, Any]:
    """The arguments that all kernels share."""
    heads, seq_q, head = query.shape[1:]
    heads_k, seq_k, head_v = value.shape[1:]
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = tf32 and hardware.of(query).tf32
    return {
        "heads": heads,
        "group": heads // heads_k,
        "seq_q": seq_q,
        "seq_k": seq_k,
        # Clamping changes nothing that exists and keeps the kernels' sums within 32 bits.
        "diagonal": 0 if diagonal is None else max(-seq_q, min(diagonal, seq_k)),
        "HEAD": head,
        "HEAD_V": head_v,
        # tl.dot wants powers of two, 16 at least.
        "DIM": max(16, triton.next_power_of_2(head)),
        "DIM_V": max(16, triton.next_power_of_2(head_v)),
        "scale": scale,
        "CAUSAL": diagonal is not None,
        "FOLD": query.dtype != torch.float32 and scale > 0.0,
        "PRECISION": "tf32" if tf32 else "ieee",
        "enable_fp_fusion": True,
    }


def _addressable(tensor: torch.Tensor) -> torch.Tensor:
    """Offsets within the largest tile, 128 rows of 256, must fit 32 bits."""
    fits = 128 * tensor.stride(2) + 256 * tensor.stride(3) < 2**31
    return tensor if fits else tensor.contiguous()


@replayed
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    diagonal: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, Sq, Dv), in query's memory order of heads and rows, and lse (B, H, Sq)."""
    if mask is not None:
        raise ValueError("mask must be None: the Triton kernels do not serve masks")
    query, key, value = _addressable(query), _addressable(key), _addressable(value)
    batch, heads, seq_q, _ = query.shape
    if query.stride(1) < query.stride(2):
        out = made(query.new_empty(batch, seq_q, heads, value.shape[3]).transpose(1, 2))
    else:
        out = made(query.new_empty(batch, heads, seq_q, value.shape[3]))
    lse = made(query.new_empty(batch, heads, seq_q, dtype=torch.float32))
    if lse.numel() == 0:
        return out, lse
    config = _config("forward", query, value)
    with hardware.guard(query.device):
        launch(
            forward_kernel, (triton.cdiv(seq_q, config["BLOCK_M"]) * batch * heads,),
            query, key, value, out, lse,
            query.stride(), key.stride(), value.stride(), out.stride(),
            **_common(query, key, value, diagonal, scale), **config,
        )  # fmt: skip
    return out, lse


@replayed
def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    diagonal: int | None,
    scale: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients that needs asks for, laid out as torch.empty_like lays them out."""
    if mask is not None:
        raise ValueError("mask must be None: the Triton kernels do not serve masks")
    needs_query, needs_key, needs_value = needs
    grad_query = made(torch.empty_like(query)) if needs_query else None
    grad_key = made(torch.empty_like(key)) if needs_key else None
    grad_value = made(torch.empty_like(value)) if needs_value else None
    query, key, value = _addressable(query), _addressable(key), _addressable(value)
    grad_out, out, lse = _addressable(grad_out), _addressable(out), lse.contiguous()
    batch, heads, seq_q, _ = query.shape
    heads_k, seq_k = key.shape[1:3]
    delta = made(torch.empty_like(lse))
    common = _common(query, key, value, diagonal, scale)
    inputs = (query, key, value, grad_out, lse, delta)
    strides = (query.stride(), key.stride(), value.stride(), grad_out.stride())
    with hardware.guard(query.device):
        if delta.numel() and (needs_query or needs_key):
            rows = 16 if query.dtype == torch.float32 else 64
            dlse_stride = (0, 0, 0) if grad_lse is None else grad_lse.stride()
            launch(
                delta_kernel, (triton.cdiv(seq_q, rows) * batch * heads,),
                out, grad_out, grad_lse, delta, out.stride(), grad_out.stride(), dlse_stride,
                heads, seq_q, HEAD_V=value.shape[3], DIM_V=common["DIM_V"],
                HAS_DLSE=grad_lse is not None, FOLD=query.dtype != torch.float32,
                PRECISION=common["PRECISION"], BLOCK_M=rows, enable_fp_fusion=True,
            )  # fmt: skip
        if grad_query is not None and delta.numel():
            config = _config("grad_query", query, value)
            launch(
                grad_query_kernel, (triton.cdiv(seq_q, config["BLOCK_M"]) * batch * heads,),
                *inputs, grad_query, *strides, grad_query.stride(), **common, **config,
            )  # fmt: skip
        config = _config("grad_key_value", query, value)
        tiles = triton.cdiv(seq_k, config["BLOCK_N"]) * batch * heads_k
        for key_now, value_now in _passes(query, value, needs_key, needs_value) if tiles else ():
            dk = grad_key if key_now and grad_key is not None else key
            dv = grad_value if value_now and grad_value is not None else value
            launch(
                grad_key_value_kernel, (tiles,),
                *inputs, dk, dv, *strides, dk.stride(), dv.stride(),
                NEEDS_KEY=key_now, NEEDS_VALUE=value_now, **common, **config,
            )  # fmt: skip
    return grad_query, grad_key, grad_value


def _passes(
    query: torch.Tensor, value: torch.Tensor, needs_key: bool, needs_value: bool
) -> list[tuple[bool, bool]]:
    """dK and dV at once, unless their two accumulators are more than the registers hold."""
    wide = max(query.shape[3], value.shape[3]) > 128 and query.dtype != torch.float32
    if wide and needs_key and needs_value:
        return [(True, False), (False, True)]
    return [(needs_key, needs_value)] if needs_key or needs_value else []
