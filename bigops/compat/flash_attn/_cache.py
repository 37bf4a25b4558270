"""How flash_attn's caches become pages, which is what `bigops.decode_attention` reads in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.arguments import ArgumentError
from ...reference.decode_attention import rotated as _rotated

MOST_QUERIES = 16  # of a sequence, for which decoding is meant; many reuse keys that are gathered


class Pages(NamedTuple):
    """key and value: (num_pages, page_size, Hk, D), or the cache as it is if there is no table."""

    key: Tensor
    value: Tensor
    table: Tensor | None


def pages(
    k_cache: Tensor,
    v_cache: Tensor,
    batch: int,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> Pages:
    """Views of the caches such that each sequence begins with its table's first page.

    A row that cache_batch_idx picks is a page as long as the cache; a sequence that begins anywhere
    in its row is made of pages of one key.
    """
    if block_table is not None:
        for name, given in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if given is not None:
                raise ArgumentError(f"{name} must be None with a block_table, as in flash_attn")
        return Pages(k_cache, v_cache, block_table)
    if cache_leftpad is None:
        table = None if cache_batch_idx is None else cache_batch_idx[:, None]
        return Pages(k_cache, v_cache, table)
    row = cache_batch_idx
    if row is None:
        row = torch.arange(batch, device=k_cache.device)
    length = k_cache.shape[1]
    place = cache_leftpad[:, None] + torch.arange(length, device=k_cache.device)
    # Past the row's end there is no key, and no page is read.
    place = place.clamp(max=max(length - 1, 0))
    between = _rows_between(k_cache)
    if between != _rows_between(v_cache):
        raise ArgumentError("v_cache must have k_cache's layout with cache_leftpad")
    table = (row[:, None] * between + place).to(torch.int32)
    return Pages(_rows(k_cache, between), _rows(v_cache, between), table)


def _rows_between(cache: Tensor) -> int:
    """How many rows lie from one sequence of the cache to the next."""
    whole, row = cache.stride()[:2]
    if cache.shape[0] <= 1:
        return cache.shape[1]
    if row == 0 or whole % row:
        raise ArgumentError(
            "k_cache and v_cache must have sequences that begin a multiple of rows apart with "
            f"cache_leftpad, got strides {tuple(cache.stride())}"
        )
    return whole // row


def _rows(cache: Tensor, between: int) -> Tensor:
    """(rows, 1, Hk, D), a view of all memory from the first key to the last."""
    sequences, length, heads, size = cache.shape
    rows = (sequences - 1) * between + length if sequences else 0
    step, *last = cache.stride()[1:]
    return cache.as_strided((rows, 1, heads, size), (step, step, *last))


def lengths(
    cache_seqlens: int | Tensor | None, q: Tensor, k_cache: Tensor, block_table: Tensor | None
) -> Tensor:
    """cache_seqlens for each sequence."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    if cache_seqlens is None:
        held = 1 if block_table is None else block_table.shape[1]
        cache_seqlens = held * k_cache.shape[1]
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, interleaved: bool, each: bool
) -> Tensor:
    """x (B, H, S, D) by the angles of first[b] + i, or of first[b] if not each has its own."""
    step = torch.arange(x.shape[2], device=x.device) * int(each)
    return _rotated(x, cos, sin, first[:, None].long() + step, interleaved)


def decodes(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, dropout_p: float
) -> bool:
    """Whether all sequences have the same few queries, and nothing but the output is asked for."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    batch = cu_seqlens_q.shape[0] - 1
    alike = 0 < max_seqlen_q <= MOST_QUERIES and q.shape[0] == batch * max_seqlen_q
    return alike and not recorded and dropout_p == 0.0


def packed_rows(
    cu_seqlens_k: Tensor, max_seqlen_k: int, block_table: Tensor, page_size: int
) -> Tensor:
    """Where among the rows of all pages each key of the packed sequences is.

    There are as many as there could be, since only cu_seqlens_k's memory knows the number: the last
    ones are of no sequence.
    """
    batch, most = block_table.shape
    count = batch * min(max_seqlen_k, most * page_size)
    row = torch.arange(count, device=block_table.device)
    sequence = torch.searchsorted(cu_seqlens_k, row, right=True) - 1
    inside = (sequence >= 0) & (sequence < batch)
    sequence = sequence.clamp(0, batch - 1)
    place = (row - cu_seqlens_k[sequence]).clamp(0, most * page_size - 1)
    page = block_table[sequence, place // page_size].long()
    return torch.where(inside, page * page_size + place % page_size, 0)
