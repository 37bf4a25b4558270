"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), with the scores in full."""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox

FP8 = torch.float8_e4m3fn


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    left: int = -1,
    right: int = -1,
    top_left: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    *,
    first_sequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of (B, H, S, D) tensors.

    Query i sees key j iff -left <= j - i - offset <= right (a negative bound is none), where offset
    is Sk - Sq, or 0 if top_left, and the boolean bias says True; a floating bias is added to the
    scores, and hides where it is -inf. Before it come, in this order, scale, softcap and ALiBi. A
    row that sees nothing gives 0 and has no gradient. first_sequence: what dropout counts the
    batch from.
    """
    narrow = query.dtype == FP8
    if narrow:
        query, key, value = query.float(), key.float(), value.float()
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = _descaled(key, k_descale), _descaled(value, v_descale)
    query = _descaled(query, None if q_descale is None else q_descale.repeat_interleave(group, 1))
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-2, -1)) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    batch, heads, rows, columns = scores.shape
    i = torch.arange(rows, device=query.device).unsqueeze(1)
    j = torch.arange(columns, device=query.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.reshape(-1, heads, 1, 1).to(scores.dtype)
        scores = scores - slopes * (i + (columns - rows) - j).abs()
    ahead = j - i - (0 if top_left else columns - rows)
    seen = torch.ones((rows, columns), dtype=torch.bool, device=query.device)
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        scores = scores + bias
        seen = seen & (bias != float("-inf"))
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = scores
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        total = torch.cat((scores, sink), dim=-1)
    lse = torch.logsumexp(total, dim=-1)
    # Where nothing is seen lse is -inf, and scores - lse would be NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    weights = torch.exp(scores - shift)
    if seed is not None:
        keeps = philox.attention_keeps(seed, batch, heads, rows, columns, dropout_p, first_sequence)
        weights = weights * keeps * philox.factor(dropout_p)
    out = weights.to(value.dtype) @ value
    return out.bfloat16() if narrow else out, lse


def _descaled(t: Tensor, descale: Tensor | None) -> Tensor:
    return t if descale is None else t * descale[..., None, None].to(t.dtype)
