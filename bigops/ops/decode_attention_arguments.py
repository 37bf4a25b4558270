"""decode_attention's arguments, and what is said when one does not fit. Metadata only: what the
lengths and the page numbers are, the CPU's backends look at themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments
from .arguments import ArgumentError
from .attention_arguments import bounds, lse_dtype, on_device, per_head

MOST_KEYS = 2**30  # of a sequence: the kernels' sums stay within 32 bits


def check_cache(query: Tensor, k_cache: Tensor, v_cache: Tensor, paged: bool) -> None:
    """The caches fit the query and each other."""
    arguments.alike(query=query, k_cache=k_cache, v_cache=v_cache)
    batch, heads, _, head_size = query.shape
    if not paged and k_cache.shape[0] != batch:
        raise ArgumentError(
            f"k_cache must have query's batch size {batch} (or a block_table), "
            f"got {k_cache.shape[0]}"
        )
    if k_cache.shape[3] != head_size:
        raise ArgumentError(
            f"k_cache must have query's head size {head_size}, got {k_cache.shape[3]}"
        )
    kv_heads = k_cache.shape[1]
    if (heads % kv_heads) if kv_heads else heads:
        raise ArgumentError(
            f"k_cache must have a number of heads that divides query's {heads}, got {kv_heads}"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ArgumentError(
            f"v_cache must have k_cache's first sizes {tuple(k_cache.shape[:3])}, "
            f"got {tuple(v_cache.shape[:3])}"
        )
    if not paged and k_cache.shape[2] > MOST_KEYS:
        raise ArgumentError(f"k_cache must have at most 2**30 keys, got {k_cache.shape[2]}")


def lengths(cache_seqlens: Any, query: Tensor) -> Tensor:
    """cache_seqlens as a tensor; an int holds for all sequences."""
    batch = query.shape[0]
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        if not 0 <= cache_seqlens <= MOST_KEYS:
            raise ArgumentError(f"cache_seqlens must be in [0, 2**30], got {cache_seqlens}")
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=query.device)
    if not isinstance(cache_seqlens, Tensor):
        raise TypeError(
            f"cache_seqlens must be an int or a torch.Tensor, got {type(cache_seqlens).__name__}"
        )
    _check_ints("cache_seqlens", cache_seqlens, query, (batch,))
    return cache_seqlens


def check_table(block_table: Tensor, query: Tensor, page_size: int) -> None:
    """block_table: a row of pages for each sequence."""
    arguments.tensor("block_table", block_table, dims=2)
    _check_ints("block_table", block_table, query, (query.shape[0], block_table.shape[1]))
    if block_table.shape[1] * page_size > MOST_KEYS:
        raise ArgumentError(
            f"block_table must span at most 2**30 keys, "
            f"got {block_table.shape[1]} pages of {page_size}"
        )


def check_new(
    k_new: Tensor | None,
    v_new: Tensor | None,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    capacity: int,
) -> None:
    """Both or none, and then caches that can be written."""
    if k_new is None or v_new is None:
        if k_new is not v_new:
            given, missing = ("k_new", "v_new") if v_new is None else ("v_new", "k_new")
            raise ArgumentError(f"{missing} must be given with {given}, got None")
        return
    arguments.tensor("k_new", k_new, dims=4)
    batch, kv_heads, length = query.shape[0], k_cache.shape[1], k_new.shape[2]
    for name, new, cache in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        arguments.tensor(name, new, dims=4)
        arguments.alike(query=query, **{name: new})
        wanted = (batch, kv_heads, length, cache.shape[3])
        if new.shape != wanted:
            raise ArgumentError(f"{name} must have shape {wanted}, got {tuple(new.shape)}")
    if length > capacity:
        raise ArgumentError(f"k_new must fit into a cache of {capacity} keys, got {length}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        steps = zip(cache.stride(), cache.shape, strict=True)
        if cache.numel() and any(step == 0 and n > 1 for step, n in steps):
            raise ArgumentError(f"{name} must not be expanded where k_new is appended to it")


def check_rotary(
    cos: Tensor | None, sin: Tensor | None, query: Tensor, appends: bool, capacity: int
) -> None:
    """Both or none, with a row for every place in the cache."""
    if cos is None or sin is None:
        if cos is not sin:
            names = ("rotary_cos", "rotary_sin")
            given, missing = names if sin is None else names[::-1]
            raise ArgumentError(f"{missing} must be given with {given}, got None")
        return
    head_size = query.shape[3]
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        arguments.tensor(name, table, dims=2)
        on_device(name, table, query)
        if table.dtype not in (query.dtype, torch.float32):
            raise ArgumentError(f"{name} must be float32 or {query.dtype}, got {table.dtype}")
    if not appends:
        raise ArgumentError("rotary_cos must come with k_new: cached keys are rotated already")
    if 2 * cos.shape[1] > head_size:
        raise ArgumentError(
            f"rotary_cos must have at most {head_size // 2} columns, half the head size, "
            f"got {cos.shape[1]}"
        )
    if cos.shape[0] < capacity:
        raise ArgumentError(
            f"rotary_cos must have a row for each of the cache's {capacity} places, "
            f"got {cos.shape[0]}"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ArgumentError(
            f"rotary_sin must have rotary_cos' shape {tuple(cos.shape)} and dtype {cos.dtype}, "
            f"got {tuple(sin.shape)} and {sin.dtype}"
        )


def slopes(given: Tensor | None, query: Tensor) -> Tensor | None:
    """alibi_slopes, (H,) or (B, H), in lse's dtype."""
    batch, heads = query.shape[:2]
    per_head("alibi_slopes", given, query, (heads,), (batch, heads))
    return None if given is None else given.to(lse_dtype(query))


def window(value: Any, causal: bool, capacity: int) -> tuple[int, int]:
    """(left, right), where causal hides what is to the right; -1: no bound, as of one that no key
    of the cache is beyond."""
    left, right = bounds(value, causal)
    return -1 if left >= capacity else left, -1 if right > 0 and right >= capacity else right


def check_values(
    cache_seqlens: Tensor, capacity: int, new: int, table: Tensor | None, page_size: int, pages: int
) -> None:
    """What the native kernel checks too, for the reference on the CPU."""
    if cache_seqlens.numel() == 0:
        return
    if int(cache_seqlens.min()) < 0:
        raise ArgumentError(f"cache_seqlens must not be negative, got {int(cache_seqlens.min())}")
    most = int(cache_seqlens.max())
    if most + new > capacity:
        raise ArgumentError(
            f"cache_seqlens must leave room in a cache of {capacity} for {new} new keys, got {most}"
        )
    if table is None or page_size == 0:
        return
    first_key = torch.arange(table.shape[1]) * page_size
    used = table[first_key < cache_seqlens[:, None] + new]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= pages):
        raise ArgumentError(f"block_table must hold numbers of the {pages} pages, got {used}")


def no_gradient(**tensors: Tensor | None) -> None:
    """A call that autograd would record is refused, not silently left out of the graph."""
    if not torch.is_grad_enabled():
        return
    for name, given in tensors.items():
        if given is not None and given.requires_grad:
            raise ArgumentError(
                f"{name} must not require a gradient, which decoding has none of: call it under "
                "torch.no_grad(), or use bigops.attention"
            )


def _check_ints(name: str, given: Tensor, query: Tensor, shape: tuple[int, ...]) -> None:
    arguments.tensor(name, given)
    if given.dtype != torch.int32:
        raise ArgumentError(f"{name} must be int32, got {given.dtype}")
    if given.shape != shape:
        raise ArgumentError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    on_device(name, given, query)
