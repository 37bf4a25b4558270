"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), with the scores in full."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    scale: float,
    *,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of (B, H, S, D) tensors.

    Query i sees key j iff j <= i + diagonal (None: any j), i + Sk - Sq - left <= j <=
    i + Sk - Sq + right for a window (left, right) (-1: any), and the boolean mask says True; a
    floating mask is added to the scores, and hides where it is -inf. A row that sees nothing gives
    0 and has no gradient.
    """
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-2, -1)) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    rows, columns = scores.shape[-2:]
    i = torch.arange(rows, device=query.device).unsqueeze(1)
    j = torch.arange(columns, device=query.device)
    distance = i + (columns - rows) - j
    if alibi_slopes is not None:
        slopes = alibi_slopes.reshape(-1, query.shape[1], 1, 1).to(scores.dtype)
        scores = scores - slopes * distance.abs()
    seen = torch.ones((rows, columns), dtype=torch.bool, device=query.device)
    if diagonal is not None:
        seen = j <= i + diagonal
    if window[0] >= 0:
        seen = seen & (distance <= window[0])
    if window[1] >= 0:
        seen = seen & (distance >= -window[1])
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
        seen = seen & (mask != float("-inf"))
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = scores
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        total = torch.cat((scores, sink), dim=-1)
    lse = torch.logsumexp(total, dim=-1)
    # Where nothing is seen lse is -inf, and scores - lse would be NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    weights = dropout(torch.exp(scores - shift), dropout_p).to(value.dtype)
    return weights @ value, lse
