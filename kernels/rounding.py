"""Stochastic rounding to bfloat16: up or down in proportion to where a number lies between two.

`bigops/reference/rounding.py` is the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import lanes


@triton.jit
def round_to_bfloat16(x, seed, number, first, COUNT: tl.constexpr):
    """COUNT float32 numbers, elements from `first` (int64, a multiple of 8) on of the tensor of
    this number in a call."""
    drawn = tl.reshape(lanes(seed, (first // 8).to(tl.int32), number, COUNT), x.shape)
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + drawn) >> 16).to(tl.uint16)
    # Infinity and NaN have nothing to round.
    nearest = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, nearest).to(tl.bfloat16, bitcast=True)
