"""An optimizer's states as 8-bit codes, in tiles whose rows are blocks that share a scale.

`bigops/reference/codes.py` is the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

CODE_BLOCK = tl.constexpr(256)
SHIFT = tl.constexpr(20)  # 23 - 3 bits of mantissa that a code does not have
LARGEST = tl.constexpr(1.875)
INVERSE_LARGEST = tl.constexpr(1 / 1.875)
# The least size that has a scale: 1.875 times the smallest normal number.
LEAST = tl.constexpr(1.875 * 2.0**-126)
SIGNED_BIAS = tl.constexpr((127 - 15) << 23)
UNSIGNED_BIAS = tl.constexpr((127 - 31) << 23)


@triton.jit
def decode(codes, scales, SIGNED: tl.constexpr):
    """float32 numbers of codes (rows, CODE_BLOCK), scales (rows,)."""
    code = codes.to(tl.int32)
    if SIGNED:
        size = code & 127
        bits = ((size << SHIFT) + SIGNED_BIAS) | ((code & 128) << 24)
    else:
        size = code
        bits = (size << SHIFT) + UNSIGNED_BIAS
    return tl.where(size == 0, 0, bits).to(tl.float32, bitcast=True) * scales[:, None]


@triton.jit
def encode(x, SIGNED: tl.constexpr):
    """(codes, scales) of float32 numbers (rows, CODE_BLOCK)."""
    largest = tl.max(tl.abs(x), axis=1)
    there = largest >= LEAST
    scales = tl.where(there, largest * INVERSE_LARGEST, 0.0)
    inverse = tl.where(there, tl.div_rn(LARGEST, largest), 0.0)
    bits = (x * inverse[:, None]).to(tl.int32, bitcast=True)
    words = x.to(tl.uint32, bitcast=True)
    hashed = tl.mul(words, 0x9E3779B1, sanitize_overflow=False) >> (32 - SHIFT)
    size = (bits & 0x7FFFFFFF) - (SIGNED_BIAS if SIGNED else UNSIGNED_BIAS)
    code = (tl.maximum(size, 0) + hashed.to(tl.int32)) >> SHIFT
    if SIGNED:
        code = tl.minimum(code, 127) | ((bits >> 24) & 128)
    else:
        # A positive number without a sign becomes no 0: it is divided by.
        code = tl.where((code == 0) & (bits > 0), 1, tl.minimum(code, 255))
    return code.to(tl.uint8), scales
