"""From products of queries and keys to scores, and from scores and lse to probabilities.

    s = scale * (q . k)
    s = softcap * tanh(s / softcap)
    s = s - slope * |i + Sk - Sq - j|       ALiBi (Press et al. 2022, arXiv:2108.12409)
    s = s + bias[b, h, i, j]                -inf, or False of a boolean bias, hides the key

What is not given costs nothing: a switch that is off, or a pointer that is None, is compiled out.
With nothing but scale, FOLD leaves the products as they are and multiplies by scale * log2(e)
inside the exponential, one FMA per score. It rounds scores and lse in units of log2(e), which 16
bits do not notice. For fp32 (and for a negative scale) FOLD is off: the large terms cancel first, a
product more per score.

Tiles are queries by keys or, where rows and keys are given that way round, keys by queries.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """EXACT: to an ulp or two near 0 too, where 1 - 2 / (exp(2x) + 1) cancels: there a minimax
    polynomial of tanh(x) / x (fitted for |x| <= 0.6)."""
    y = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    if EXACT:
        square = x * x
        p = square * -0.005905868019908667 + 0.02080538496375084
        p = p * square - 0.053786683827638626
        p = p * square + 0.13331958651542664
        p = p * square - 0.33333298563957214
        y = tl.where(tl.abs(x) < 0.6, p * (square * x) + x, y)
    return y


@triton.jit
def given(ptr, offset):
    """The number there; 0 if there is none."""
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + offset)
    return value


@triton.jit
def scores_of(
    products, scale, softcap, slope, bias_ptr, stride_bias,
    start_m, offs_m, start_n, offs_n, seq_q, seq_k,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS_ROWS: tl.constexpr, FOLD: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The scores, in units of scale if FOLD, and the derivative of the cap.

    offs_m, offs_n: two-dimensional, of rows start_m + offs_m and keys start_n + offs_n.
    bias_ptr: the bias of this head. BIAS_ROWS: its rows differ.
    """
    scores, slant = products, 1.0
    if not FOLD:
        scores = scores * scale
    if SOFTCAP:
        ratio = tanh(scores * (1.0 / softcap), EXACT)
        scores = softcap * ratio
        slant = 1.0 - ratio * ratio
    if ALIBI:
        distance = tl.abs(start_m + seq_k - seq_q - start_n + offs_m - offs_n)
        scores = scores - slope * distance.to(tl.float32)
    if bias_ptr is not None:
        tile = bias_ptr + tl.cast(start_n, tl.int64) * stride_bias[3] + offs_n * stride_bias[3]
        mask = offs_n < seq_k - start_n
        if BIAS_ROWS:
            tile += tl.cast(start_m, tl.int64) * stride_bias[2]
            tile = tile + offs_m * stride_bias[2]
            mask = mask & (offs_m < seq_q - start_m)
        if bias_ptr.dtype.element_ty == tl.uint8:  # a boolean one
            scores = tl.where(tl.load(tile, mask=mask, other=0) != 0, scores, float("-inf"))
        else:
            scores = scores + tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    return scores, slant


@triton.jit
def probability(scores, scale, lse, FOLD: tl.constexpr):
    if FOLD:
        return tl.exp2(scores * (scale * LOG2_E) - lse * LOG2_E)
    return tl.exp2((scores - lse) * LOG2_E)
