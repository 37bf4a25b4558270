"""S_dmask: the weights, and which of them dropout drops. For tests, and of quadratic size.

Values that are the rows of an identity make attention's output its weights. torch's generator is
put back, so that the call that follows draws the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...functional import attention, varlen_attention
from ...ops import use_backend

MULTIPLE = 128


@torch.no_grad()
def padded(query: Tensor, key: Tensor, dropout_p: float, options: dict[str, Any]) -> Tensor:
    """Of query (B, H, Sq, D) and key (B, Hk, Sk, D)."""
    if dropout_p == 0.0:
        return query.new_empty(0)
    batch, heads, keys, _ = key.shape
    identity = torch.eye(keys, dtype=key.dtype, device=key.device).expand(batch, heads, -1, -1)

    def attend(p: float) -> Any:
        return attention(query, key, identity, dropout_p=p, **options)

    weights = _signed(attend, query, dropout_p)
    rows = weights.shape[2]
    found = weights.new_zeros(batch, weights.shape[1], _rounded(rows), _rounded(keys))
    found[:, :, :rows, :keys] = weights
    return found


@torch.no_grad()
def packed(
    query: Tensor, key: Tensor, packing: Any, dropout_p: float, options: dict[str, Any]
) -> Tensor:
    """Of query (T, H, D) and key (Tk, Hk, D)."""
    if dropout_p == 0.0:
        return query.new_empty(0)
    starts_q, starts_k, longest_q, longest_k = packing
    batch, heads = starts_q.shape[0] - 1, query.shape[1]
    _, place = _places(starts_k, key.shape[0])
    identity = place[:, None] == torch.arange(longest_k, device=key.device)
    values = identity.to(key.dtype)[:, None].expand(-1, key.shape[1], -1)

    def attend(p: float) -> Any:
        return varlen_attention(query, key, values, *packing, dropout_p=p, **options)

    weights = _signed(attend, query, dropout_p)
    found = weights.new_zeros(batch, heads, _rounded(longest_q), _rounded(longest_k))
    sequence, place = _places(starts_q, query.shape[0])
    inside = (sequence >= 0) & (sequence < batch)
    found[sequence[inside], :, place[inside], :longest_k] = weights[inside]
    return found


def _signed(attend: Callable[[float], Any], query: Tensor, dropout_p: float) -> Tensor:
    with use_backend("reference"):  # whose head sizes have no bound
        weights = attend(0.0)
        devices = [query.device] if query.is_cuda else []
        with torch.random.fork_rng(devices):
            kept = attend(dropout_p)
    return torch.where(kept == 0.0, -weights, weights)


def _places(starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which sequence each of the rows is of (-1 or B: of none), and its place there."""
    row = torch.arange(rows, device=starts.device)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    return sequence, row - starts[sequence.clamp(min=0)]


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
