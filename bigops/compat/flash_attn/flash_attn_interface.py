"""flash_attn.flash_attn_interface: the seven functions.

Arguments that they have in common:
    dropout_p: probability of dropping a weight; 0.0 in evaluation.
    softmax_scale: factor of the scores; None is 1/sqrt(D).
    causal: query i sees key j iff j <= i + Sk - Sq, aligned bottom-right.
    window_size: (left, right): keys from i + Sk - Sq - left to i + Sk - Sq + right; -1: no bound.
    softcap: c > 0 replaces the scores s by c * tanh(s / c).
    alibi_slopes: (H,) or (B, H): minus slope * |i + Sk - Sq - j| is added; without gradient.
    deterministic: gradients of the same bits in every run.
    return_attn_probs: return (out, softmax_lse, S_dmask), the last for tests only.
        softmax_lse: (B, H, Sq), packed (H, T), float32; inf for a row that sees no key.
        S_dmask: without dropout empty; else the weights before dropout, negative where dropped,
        (B, H, Sq, Sk) with both lengths rounded up to multiples of 128.
A row that sees no key gives 0. Keys may have fewer heads than queries, by a factor. Layouts are
views: nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...functional import attention, decode_attention, varlen_attention
from ...ops import arguments
from . import _cache, _probabilities

NO_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (B, Sq, H, D) over k (B, Sk, Hk, D) and v (B, Sk, Hk, Dv).

    Returns:
        out (B, Sq, H, Dv), or (out, softmax_lse, S_dmask).

    Example:
        >>> q, k, v = torch.randn(3, 2, 128, 8, 64).unbind()
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments.tensor(name, tensor, dims=4)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    weights = None
    if return_attn_probs:
        weights = _probabilities.padded(query, key, dropout_p, options)
    out, lse = attention(
        query, key, value, dropout_p=dropout_p, deterministic=deterministic or None,
        return_lse=True, **options,
    )  # fmt: skip
    return _returned(out.transpose(1, 2), lse, weights)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q (B, Sq, H, D) and kv (B, Sk, 2, Hk, D)."""
    arguments.tensor("kv", kv, dims=5)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (B, S, 3, H, D)."""
    arguments.tensor("qkv", qkv, dims=5)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of packed sequences: q (T, H, D), k (Tk, Hk, D), v (Tk, Hk, Dv).

    Args:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where the sequences begin and end.
        max_seqlen_q, max_seqlen_k: the longest sequences' lengths, or more.
        block_table: (B, max_pages) int32: k and v are pages, (num_pages, page_size, Hk, D), and
            cu_seqlens_k says how long the sequences in them are. Few queries, as many of each
            sequence, without gradient and dropout, read the pages where they are; else the keys
            are gathered first.

    Returns:
        out (T, H, Dv), or (out, softmax_lse, S_dmask).
    """
    arguments.tensor("q", q, dims=3)
    lengths = (_length(max_seqlen_q), _length(max_seqlen_k))
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        arguments.tensor("k", k, dims=4)
        arguments.tensor("v", v, dims=4)
        if _cache.decodes(q, k, v, cu_seqlens_q, lengths[0], dropout_p):
            query = q.unflatten(0, (-1, lengths[0])).transpose(1, 2)
            out, lse = decode_attention(
                query, k.transpose(1, 2), v.transpose(1, 2), cu_seqlens_k.diff(),
                block_table=block_table, return_lse=True, **options,
            )  # fmt: skip
            empty = q.new_empty(0) if return_attn_probs else None
            out = out.transpose(1, 2).flatten(0, 1)
            return _returned(out, lse.transpose(0, 1).flatten(1), empty)
        rows = _cache.packed_rows(cu_seqlens_k, lengths[1], block_table, k.shape[1])
        k, v = k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]
    packing = (cu_seqlens_q, cu_seqlens_k, *lengths)
    weights = None
    if return_attn_probs:
        weights = _probabilities.packed(q, k, packing, dropout_p, options)
    out, lse = varlen_attention(
        q, k, v, *packing, dropout_p=dropout_p, deterministic=deterministic or None,
        return_lse=True, **options,
    )  # fmt: skip
    return _returned(out, lse, weights)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q (T, H, D) and kv (Tk, 2, Hk, D)."""
    arguments.tensor("kv", kv, dims=4)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D)."""
    arguments.tensor("qkv", qkv, dims=4)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache, to which k and v, if given, are appended in place. No gradients.

    Args:
        q: (B, Sq, H, D).
        k_cache, v_cache: (batch_cache, Sk, Hk, D), or with block_table pages,
            (num_pages, page_size, Hk, D).
        k, v: (B, Snew, Hk, D), written at cache_seqlens[b] and on.
        rotary_cos, rotary_sin: (positions, R / 2): k is rotated by the angles of its place in the
            cache, q by those of cache_seqlens[b] + i (causal or with a window) or cache_seqlens[b].
            They need k.
        cache_seqlens: (B,) int32, or one int: how long the sequences in the cache are, padding on
            the left included. None: as long as the cache.
        cache_batch_idx: (B,) int32: sequence b is row cache_batch_idx[b] of the cache.
        cache_leftpad: (B,) int32: where in its row a sequence begins.
        block_table: (B, max_pages) int32.
        rotary_interleaved: pairs are neighbours, else elements d and d + R / 2.
        num_splits: into how many parts the keys are cut; 0 lets the kernel choose.
        return_softmax_lse: return (out, softmax_lse).

    Returns:
        out (B, Sq, H, D), or (out, softmax_lse), the latter (B, H, Sq).

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 4, 1024, 8, 64).unbind()
        >>> lengths = torch.tensor([100, 7, 0, 900], dtype=torch.int32)
        >>> q, k, v = torch.randn(3, 4, 1, 8, 64).unbind()
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths).shape
        torch.Size([4, 1, 8, 64])
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        arguments.tensor(name, tensor, dims=4)
    for name, new in (("k", k), ("v", v)):
        if new is not None:
            arguments.tensor(name, new, dims=4)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    pages = _cache.pages(k_cache, v_cache, q.shape[0], cache_batch_idx, cache_leftpad, block_table)
    lengths = _cache.lengths(cache_seqlens, q, k_cache, block_table)
    query = q.transpose(1, 2)
    key, value = (None if t is None else t.transpose(1, 2) for t in (k, v))
    if cache_leftpad is not None:
        if key is not None and rotary_cos is not None and rotary_sin is not None:
            local = causal or options["window_size"] != NO_WINDOW
            angles = (rotary_cos, rotary_sin, lengths, rotary_interleaved)
            query, key = _cache.rotated(query, *angles, local), _cache.rotated(key, *angles, True)
            rotary_cos = rotary_sin = None
        lengths = (lengths - cache_leftpad).clamp(min=0)
    out, lse = decode_attention(
        query, pages.key.transpose(1, 2), pages.value.transpose(1, 2), lengths, k_new=key,
        v_new=value, block_table=pages.table, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved, num_splits=num_splits, return_lse=True, **options,
    )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, _never_minus_infinity(lse)) if return_softmax_lse else out


def _length(longest: int | Tensor) -> int:
    """Some give a tensor."""
    return int(longest) if isinstance(longest, Tensor) else longest


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The keywords that bigops' functions share."""
    left, right = window_size
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window_size": (int(left), int(right)),  # of a tensor too
        "softcap": max(softcap, 0.0),
        "alibi_slopes": None if alibi_slopes is None else alibi_slopes.detach(),
    }


def _returned(out: Tensor, lse: Tensor, weights: Tensor | None) -> Any:
    return out if weights is None else (out, _never_minus_infinity(lse), weights)


def _never_minus_infinity(lse: Tensor) -> Tensor:
    """flash_attn says inf of a row that sees no key."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))
