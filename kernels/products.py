"""Adding up products of tiles: where a sum is long, how it is split decides its error."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, for a loop that adds up many.

    A tensor core adds several products at once. IEEE products of fp32 are FMAs, one after the
    other: `tl.dot(a, b, acc)` in a loop makes one chain of all of them, whose error grows with the
    square root of its length (Higham 2002, "Accuracy and stability of numerical algorithms", 4.2).
    Each step's chain starts at 0 instead and is added as a whole. By an FMA, since Triton moves an
    addition into the product (Combine.td), which would make it one chain again.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)
