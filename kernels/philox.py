"""Which elements dropout keeps, and which round up: Philox4x32-10 (Salmon et al. 2011), the bits
of every backend.

A call of the generator serves 8 elements of a row: word e // 2 of its four holds the 16-bit lane
of element e, the low half first. An element stays iff its lane is at least `threshold`.
`bigops/reference/philox.py` is the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A probability is rounded to so many parts of 1.
PARTS = 1 << 16


def dropout_terms(p: float) -> tuple[int, float]:
    """The threshold of a probability of dropping, and the factor of what stays."""
    threshold = round(PARTS * p)
    return threshold, PARTS / (PARTS - threshold) if threshold < PARTS else 0.0


@triton.jit
def keep_mask(seed, rows, first, plane, threshold, COLUMNS: tl.constexpr):
    """For each of `rows` (1-D) of a plane: which of elements first to first + COLUMNS stay.

    first and COLUMNS are multiples of 8.
    """
    calls = first // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = tl.philox(seed, calls[None, :], rows[:, None], plane, 0)
    low = tl.join(
        tl.join(_low(w0, threshold), _low(w2, threshold)),
        tl.join(_low(w1, threshold), _low(w3, threshold)),
    )
    high = tl.join(
        tl.join(_high(w0, threshold), _high(w2, threshold)),
        tl.join(_high(w1, threshold), _high(w3, threshold)),
    )
    return tl.reshape(tl.join(low, high), [rows.shape[0], COLUMNS])


@triton.jit
def lanes(seed, first_call, c1, COUNT: tl.constexpr):
    """COUNT numbers of 16 bits (uint32) from calls of counter (first_call.., c1, 0, 0)."""
    calls = first_call + tl.arange(0, COUNT // 8)
    w0, w1, w2, w3 = tl.philox(seed, calls, c1, 0, 0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [COUNT])


@triton.jit
def _low(words, threshold):
    return (words & 0xFFFF).to(tl.int32) >= threshold


@triton.jit
def _high(words, threshold):
    return (words >> 16).to(tl.int32) >= threshold
