"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in plain
torch: the bits behind dropout, the same on every backend.

Key: the low and the high half of a 64-bit seed. A call gives four words of 32 bits, here read as
eight lanes of 16: lane 2n is the low half of word n, lane 2n + 1 its high half.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LANES = 8
WORD = 0xFFFFFFFF


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of factor * x, without leaving int64."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & WORD


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for each counter, as int64; `seed` is an int64 tensor of one element."""
    seed = seed.reshape(())
    keys = [seed & WORD, (seed >> 32) & WORD]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0
        keys = [(key + step) & WORD for key, step in zip(keys, WEYL, strict=True)]
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """A lane of this or above is kept."""
    return round(65536 * p)


def factor(p: float) -> float:
    """What the kept are multiplied by: the inverse of the exact keep rate."""
    dropped = threshold(p)
    return 65536.0 / (65536 - dropped) if dropped < 65536 else 0.0


def attention_keeps(
    seed: Tensor, batch: int, heads: int, rows: int, columns: int, p: float, first: int = 0
) -> Tensor:
    """Which of attention's weights dropout keeps: (batch, heads, rows, columns), bool.

    The weight of query i for key j in head h of sequence first + b has the counter
    (j // 8, i, (first + b) * heads + h, 0) and of its lanes the one of number j % 8.
    """

    def count(n: int) -> Tensor:
        return torch.arange(n, device=seed.device)

    planes = count(batch * heads).view(batch, heads, 1, 1) + first * heads
    groups = count(-(-columns // LANES)) + torch.zeros_like(planes + count(rows)[:, None])
    words = philox(seed, (groups, count(rows)[:, None], planes, torch.zeros_like(planes)))
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    drawn = torch.stack(lanes, -1).flatten(-2)[..., :columns]
    return drawn >= threshold(p)
