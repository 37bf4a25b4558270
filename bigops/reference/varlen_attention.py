"""Attention of packed sequences: each by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import FP8, attention


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse), (T, H, Dv) and (H, T), of query (T, H, D), key and value (Tk, Hk, ...).

    Sequence b has the rows from cu_seqlens[b] up to cu_seqlens[b + 1]; rows of no sequence give 0
    and lse -inf. bias broadcasts to (B, H, max_seqlen_q, max_seqlen_k) and is read at the places
    within the sequence. rest: left, right, scale, softcap, dropout_p.
    """
    left, right, *last = rest
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch, heads = len(starts_q) - 1, query.shape[1]
    if bias is not None:
        bias = bias.expand(batch, heads, max_seqlen_q, max_seqlen_k)
    dtype = torch.bfloat16 if query.dtype == FP8 else query.dtype
    out = query.new_zeros((query.shape[0], heads, value.shape[2]), dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    lse = query.new_full((heads, query.shape[0]), float("-inf"), dtype=wide)
    for b in range(batch):
        rows, keys = (slice(s[b], s[b + 1]) for s in (starts_q, starts_k))
        n, m = rows.stop - rows.start, keys.stop - keys.start
        one = [t.transpose(0, 1)[None] for t in (query[rows], key[keys], value[keys])]
        own = [t if t is None else t[b : b + 1] for t in (q_descale, k_descale, v_descale)]
        call: list[Any] = [
            *one,
            None if bias is None else bias[b : b + 1, :, :n, :m],
            sinks,
            None if alibi_slopes is None else alibi_slopes[b : b + 1],
            seed,
            *own,
            *(left, right, False, *last),
        ]
        found = attention(*call, first_sequence=b)
        # Not in place: a view's gradient would be that of the whole for each sequence.
        out = torch.cat((out[: rows.start], found[0][0].transpose(0, 1), out[rows.stop :]))
        lse = torch.cat((lse[:, : rows.start], found[1][0], lse[:, rows.stop :]), dim=1)
    return out, lse
