"""Attention of new queries over a cache of keys and values, with the scores in full."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rotary_interleaved: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of (B, H, Sq, D) queries; k_new and v_new are written into the caches.

    Query i of a sequence with N keys sees key j iff -left <= j - (i + N - Sq) <= right (negative
    bounds: no bound). One that sees nothing gives 0.
    """
    lengths = cache_seqlens.long()
    rows = torch.arange(query.shape[2], device=query.device)
    if k_new is not None and v_new is not None:
        new = lengths[:, None] + torch.arange(k_new.shape[2], device=query.device)
        if rotary_cos is not None and rotary_sin is not None:
            local = left >= 0 or right >= 0
            own = lengths[:, None] + (rows if local else torch.zeros_like(rows))
            query = rotated(query, rotary_cos, rotary_sin, own, rotary_interleaved)
            k_new = rotated(k_new, rotary_cos, rotary_sin, new, rotary_interleaved)
        append(k_cache, k_new, new, block_table)
        append(v_cache, v_new, new, block_table)
        lengths = lengths + k_new.shape[2]
    key, value = contiguous(k_cache, block_table), contiguous(v_cache, block_table)
    group = query.shape[1] // max(key.shape[1], 1)
    j = torch.arange(key.shape[2], device=query.device)
    # Not 0 times whatever is there.
    value = value.masked_fill((j >= lengths[:, None])[:, None, :, None], 0.0)
    if group > 1:  # a copy of whole caches otherwise
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-2, -1)) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = j - (rows + lengths[:, None] - len(rows))[..., None]  # (B, Sq, keys)
    if alibi_slopes is not None:
        slopes = alibi_slopes.reshape(-1, query.shape[1], 1, 1).to(scores.dtype)
        scores = scores - slopes * ahead.abs().unsqueeze(1)
    seen = (j < lengths[:, None])[:, None]
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = scores
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        total = torch.cat((scores, sink), dim=-1)
    lse = torch.logsumexp(total, dim=-1)
    # Where nothing is seen lse is -inf, and scores - lse would be NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    return torch.exp(scores - shift).to(value.dtype) @ value, lse


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> Tensor:
    """x (B, H, S, D), whose first 2 * cos.shape[1] elements are turned by the angles of positions
    (B, S): pairs of neighbours or of the two halves (Su et al. 2021, "RoFormer", eq. 34)."""
    half = cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[positions].unsqueeze(1).to(wide), sin[positions].unsqueeze(1).to(wide)
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def append(cache: Tensor, new: Tensor, positions: Tensor, block_table: Tensor | None) -> None:
    """new (B, Hk, S, D) is written at positions (B, S)."""
    if block_table is None:
        page, slot = torch.arange(len(new), device=new.device)[:, None], positions
    else:
        page = block_table.long().gather(1, positions // cache.shape[2])
        slot = positions % cache.shape[2]
    cache[page, :, slot] = new.transpose(1, 2)


def contiguous(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """(B, Hk, S, D). What the table says beyond a sequence's own pages means nothing."""
    if block_table is None:
        return cache
    if cache.shape[0] == 0:
        return cache.new_zeros(len(block_table), cache.shape[1], 0, cache.shape[3])
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]  # (B, pages, Hk, size, D)
    return pages.transpose(1, 2).flatten(2, 3)
