"""decode_attention's samples, its eager baseline and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..reference.decode_attention import append, contiguous, rotated
from ..reference.decode_attention import decode_attention as reference
from .declare import Call, Cost, Sample
from .decode_attention_arguments import window


def eager(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | int, **kwargs: Any
) -> Any:
    """torch's own attention over the whole cache, with a mask of what each query sees."""
    kwargs.pop("num_splits", None)
    return_lse = kwargs.pop("return_lse", False)
    causal, size = kwargs.pop("causal", True), kwargs.pop("window_size", (-1, -1))
    scale = kwargs.pop("scale", None)
    lengths = torch.as_tensor(cache_seqlens, device=query.device).expand(query.shape[0]).long()
    names = ("k_new", "v_new", "block_table", "rotary_cos", "rotary_sin", "alibi_slopes", "sinks")
    k_new, v_new, table, cos, sin, slopes, sinks = (kwargs.pop(name, None) for name in names)
    interleaved = kwargs.pop("rotary_interleaved", False)
    capacity = k_cache.shape[2] * (1 if table is None else table.shape[1])
    left, right = window(size, causal, capacity)
    if return_lse or slopes is not None or sinks is not None or kwargs.get("softcap"):
        scale = query.shape[3] ** -0.5 if scale is None else scale
        tensors = (query, k_cache, v_cache, lengths, k_new, v_new, table, cos, sin, slopes, sinks)
        options = (interleaved, left, right, scale, kwargs.get("softcap", 0.0))
        found = reference(*tensors, *options)
        return found if return_lse else found[0]
    rows = torch.arange(query.shape[2], device=query.device)
    if k_new is not None:
        new = lengths[:, None] + torch.arange(k_new.shape[2], device=query.device)
        if cos is not None:
            local = left >= 0 or right >= 0
            own = lengths[:, None] + (rows if local else torch.zeros_like(rows))
            query = rotated(query, cos, sin, own, interleaved)
            k_new = rotated(k_new, cos, sin, new, interleaved)
        append(k_cache, k_new, new, table)
        append(v_cache, v_new, new, table)
        lengths = lengths + k_new.shape[2]
    key, value = contiguous(k_cache, table), contiguous(v_cache, table)
    j = torch.arange(key.shape[2], device=query.device)
    ahead = j - (rows + lengths[:, None] - len(rows))[..., None]
    seen = (j < lengths[:, None])[:, None]
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    seen = seen.unsqueeze(1).expand(-1, 1, len(rows), -1)
    if query.numel() * key.numel() == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
    )


def cost(
    passes: str,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    **kwargs: Any,
) -> Cost:
    """Of the keys that there are: each is read once."""
    batch, heads, rows, head_size = query.shape
    new = kwargs["k_new"].shape[2] if kwargs.get("k_new") is not None else 0
    table = kwargs.get("block_table")
    # Of a fake tensor's lengths nothing is known: the whole cache.
    lengths = [k_cache.shape[2] * (1 if table is None else table.shape[1]) - new] * batch
    if isinstance(cache_seqlens, int):
        lengths = [cache_seqlens] * batch
    elif not isinstance(cache_seqlens, FakeTensor):
        lengths = cache_seqlens.tolist()
    left = kwargs.get("window_size", (-1, -1))[0]
    keys = sum(n + new if left < 0 else min(n + new, left + rows) for n in lengths)
    sizes = head_size + v_cache.shape[3]
    elements = k_cache.shape[1] * (keys + batch * new) * sizes + batch * heads * rows * sizes
    return Cost(2.0 * keys * heads * rows * sizes, elements * query.element_size())


def angles(places: int, size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (places, size / 2), of RoFormer's frequencies."""
    rates = 10000.0 ** (-torch.arange(0, size, 2, device=device).float() / max(size, 1))
    turned = torch.arange(places, device=device).float()[:, None] * rates
    return turned.cos().to(dtype), turned.sin().to(dtype)


def paged(
    keys: Tensor, values: Tensor, page_size: int, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Hk, S, D) caches as pages in random order, and the table of them."""
    batch, _, length, _ = keys.shape
    pages = -(-length // page_size)
    order = torch.randperm(batch * pages + spare)[: batch * pages].to(keys.device)
    pools = []
    for cache in (keys, values):
        padded = F.pad(cache, (0, 0, 0, pages * page_size - length))
        split = padded.unflatten(2, (pages, page_size)).transpose(1, 2).flatten(0, 1)
        pool = torch.randn_like(split[:1]).repeat(batch * pages + spare, 1, 1, 1)
        pool[order] = split
        pools.append(pool)
    return pools[0], pools[1], order.view(batch, pages).int()


def _sample(
    name: str,
    shape: tuple[int, int, int, int],
    places: int,
    *,
    lengths: Sequence[int] | int | None = None,
    kv_heads: int | None = None,
    value_size: int | None = None,
    new: int = 0,
    page_size: int = 0,
    rotary: int = 0,
    slopes: bool = False,
    sinks: bool = False,
    heads_inside: bool = False,
    bench: bool = False,
    **kwargs: Any,
) -> Sample:
    """places: of a cache. lengths: all that leaves room for the new keys, if not given."""
    batch, heads, rows, head_size = shape
    kv_heads = kv_heads or heads

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw(heads: int, length: int, size: int) -> Tensor:
            if heads_inside:
                drawn = torch.randn(batch, length, heads, size, device=device, dtype=dtype)
                return drawn.transpose(1, 2)
            return torch.randn(batch, heads, length, size, device=device, dtype=dtype)

        query = draw(heads, rows, head_size)
        keys = draw(kv_heads, places, head_size)
        values = draw(kv_heads, places, value_size or head_size)
        extra = dict(kwargs)
        if new:
            extra["k_new"] = draw(kv_heads, new, head_size)
            extra["v_new"] = draw(kv_heads, new, value_size or head_size)
        if page_size:
            keys, values, extra["block_table"] = paged(keys, values, page_size, spare=1)
        if rotary:
            pages = -(-places // page_size) if page_size else 1
            table = angles(pages * (page_size or places) + rows, rotary, device, dtype)
            extra["rotary_cos"], extra["rotary_sin"] = table
        if slopes:
            extra["alibi_slopes"] = torch.rand(batch, heads, device=device)
        if sinks:
            extra["sinks"] = torch.randn(heads, device=device)
        if isinstance(lengths, int):  # the function takes it as it is
            return (query, keys, values, lengths), extra
        spread = [places - new] * batch if lengths is None else list(lengths)
        seqlens = torch.tensor(spread, dtype=torch.int32, device=device)
        return (query, keys, values, seqlens), extra

    return Sample(name, make, bench=bench)


SAMPLES = (
    _sample("one element", (1, 1, 1, 1), 1),
    _sample("lengths 0 to all", (4, 2, 1, 16), 40, lengths=(0, 1, 17, 40), return_lse=True),
    _sample("append", (3, 2, 1, 16), 40, lengths=(0, 7, 39), new=1),
    _sample("append with rotary", (2, 4, 1, 32), 40, lengths=(3, 20), kv_heads=2, new=1, rotary=32),
    _sample("4096 elements", (4, 8, 2, 64), 600, lengths=(600, 5, 511, 513), kv_heads=4),
    _sample("lengths as an int", (2, 2, 1, 24), 30, lengths=20),
    _sample("more queries than keys", (2, 2, 9, 8), 12, lengths=(3, 12), return_lse=True),
    _sample("not causal", (2, 2, 5, 8), 12, lengths=(3, 12), causal=False),
    _sample("append several", (2, 2, 5, 16), 64, lengths=(0, 59), new=5, rotary=8),
    _sample("rotary, interleaved, partial", (2, 2, 3, 20), 30, lengths=(4, 20), new=3, rotary=12,
            rotary_interleaved=True),
    _sample("rotary, not causal", (2, 2, 3, 16), 30, lengths=(4, 20), new=2, rotary=16,
            causal=False),
    _sample("pages of 16", (3, 4, 1, 32), 100, lengths=(100, 16, 33), kv_heads=2, page_size=16),
    _sample("pages of 1", (2, 2, 1, 16), 21, lengths=(3, 21), page_size=1),
    _sample("pages of 7, append", (2, 2, 2, 16), 40, lengths=(6, 30), new=2, page_size=7,
            rotary=16),
    _sample("window", (2, 2, 3, 16), 700, lengths=(700, 40), window_size=(64, 0)),
    _sample("window to both sides", (2, 2, 9, 16), 50, lengths=(50, 20), causal=False,
            window_size=(10, 3)),
    _sample("gqa 8:1", (2, 8, 2, 48), 130, kv_heads=1, lengths=(130, 64)),
    _sample("40 rows of a key head", (1, 8, 5, 64), 600, kv_heads=1),
    _sample("value size differs", (2, 2, 1, 48), 40, value_size=32),
    _sample("head size 192/128", (1, 2, 1, 192), 40, value_size=128),
    _sample("head size 256", (1, 2, 1, 256), 40),
    _sample("odd sizes", (2, 3, 2, 33), 31, value_size=7, lengths=(31, 30)),
    _sample("heads inside", (2, 4, 1, 32), 70, kv_heads=2, heads_inside=True, new=1),
    _sample("scale", (1, 2, 2, 8), 24, scale=0.3),
    _sample("softcap", (1, 2, 2, 16), 40, softcap=2.0, return_lse=True),
    _sample("alibi slopes", (2, 4, 3, 16), 40, lengths=(40, 33), slopes=True),
    _sample("sinks", (2, 4, 2, 16), 600, lengths=(600, 0), sinks=True, return_lse=True),
    _sample("everything", (2, 4, 3, 32), 90, lengths=(80, 2), kv_heads=2, value_size=16, new=3,
            page_size=8, rotary=32, slopes=True, sinks=True, softcap=3.0, window_size=(50, 0),
            num_splits=2, return_lse=True),
    _sample("splits", (2, 2, 1, 16), 3000, lengths=(3000, 200), num_splits=5, return_lse=True),
    _sample("long", (1, 2, 1, 64), 3000),
    _sample("no cache", (1, 2, 1, 8), 0),
    _sample("no queries", (1, 2, 0, 8), 5),
    _sample("no batch", (0, 2, 1, 8), 5),
    _sample("32x8x4096x64", (32, 8, 1, 64), 4096, bench=True),
    _sample("32x8:2x4096x64", (32, 8, 1, 64), 4096, kv_heads=2, bench=True),
    _sample("32x8:2x4096x128", (32, 8, 1, 128), 4096, kv_heads=2, bench=True),
    _sample("32x8:2x4096x128, pages of 64, append", (32, 8, 1, 128), 4096, kv_heads=2, new=1,
            page_size=64, rotary=128, bench=True),
)  # fmt: skip


def _varied(*, batch: int = 32, heads: int = 8, places: int = 1024, kv_heads: int = 2) -> Sample:
    name = f"{batch}x{heads}:{kv_heads}x{places}x64"
    return _sample(name, (batch, heads, 1, 64), places, kv_heads=kv_heads, bench=True)


SWEEPS = {
    "S": lambda size, device: _varied(places=size, batch=8),
    "B": lambda size, device: _varied(batch=size),
    "H": lambda size, device: _varied(heads=2 * size),
}
