"""decode_attention's random calls, legal and illegal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .declare import Call, Chooser, Sample
from .decode_attention_cases import angles, paged
from .fuzz import (
    Arguments,
    Fault,
    changed,
    instead,
    layout,
    longer,
    on_meta,
    other_dtype,
    sizes,
    spoilt,
)

# Around the borders of chunks, blocks and splits.
PLACES = (5, 1, 2, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 129, 511, 512, 513, 600)
HEAD_SIZES = (8, 1, 2, 3, 7, 16, 20, 32, 33, 64, 80, 96, 128, 192, 256)
MOST_PRODUCTS = 2**18  # of query and keys: milliseconds
POSITIONAL = ("query", "k_cache", "v_cache", "cache_seqlens")


def arbitrary(choose: Chooser) -> Sample:
    """A small call; shapes, strides, lengths, pages and options of any kind."""
    batch, kv_heads = choose.choice((1, 2, 3, 0)), choose.choice((1, 2, 3))
    heads = kv_heads * choose.choice((1, 2, 3, 8))
    rows, new = choose.choice((1, 2, 3, 9, 17, 0)), choose.choice((0, 1, 1, 2, 5))
    places = max(choose.choice(PLACES), new)
    pairs = max(1, batch * heads * rows * places)
    fitting = [size for size in HEAD_SIZES if size * pairs <= MOST_PRODUCTS] or [1]
    head_size, value_size = choose.choice(fitting), choose.choice(fitting)
    page_size = choose.choice((0, 0, 1, 3, 16, 64))
    lengths = [choose.choice((places - new, 0, (places - new) // 2)) for _ in range(batch)]
    shapes = {
        "query": (batch, heads, rows, head_size),
        "k_cache": (batch, kv_heads, places, head_size),
        "v_cache": (batch, kv_heads, places, value_size),
    }
    if new:
        shapes["k_new"] = (batch, kv_heads, new, head_size)
        shapes["v_new"] = (batch, kv_heads, new, value_size)
    layouts = {
        name: layout(choose, 4, expanded=0 if new and name.endswith("cache") else 2)
        for name in shapes
    }
    lies_lengths, lies_table = layout(choose, 1), layout(choose, 2)
    rotary = 2 * choose.choice((0, head_size // 2, head_size // 4)) if new else 0
    kwargs: dict[str, Any] = {}
    if rotary:
        kwargs["rotary_interleaved"] = choose.choice((False, True))
    if choose.choice((False, True)):
        kwargs["causal"] = False
    if (window := choose.choice((None, (0, 0), (3, 2), (-1, 1), (70, -1)))) is not None:
        kwargs["window_size"] = window
    if (scale := choose.choice((None, 0.3, 1.0, -0.5))) is not None:
        kwargs["scale"] = scale
    if softcap := choose.choice((0.0, 0.0, 2.0, 50.0)):
        kwargs["softcap"] = softcap
    if num_splits := choose.choice((0, 0, 1, 2, 7)):
        kwargs["num_splits"] = num_splits
    if choose.choice((False, True)):
        kwargs["return_lse"] = True
    slopes = choose.choice((None, None, (heads,), (batch, heads)))
    sinks = choose.choice((False, False, True))

    def make(device: str, dtype: torch.dtype) -> Call:
        drawn = {n: torch.randn(shape, device=device, dtype=dtype) for n, shape in shapes.items()}
        extra = dict(kwargs)
        if page_size:
            keys, values, table = paged(drawn["k_cache"], drawn["v_cache"], page_size, spare=2)
            drawn["k_cache"], drawn["v_cache"] = keys, values
            used = torch.arange(table.shape[1]) * page_size < torch.tensor(lengths)[:, None] + new
            extra["block_table"] = lies_table.laid(table.where(used.to(device), 2**30))
        laid = {name: layouts[name].laid(t) for name, t in drawn.items()}
        if rotary:
            count = -(-places // page_size) * page_size if page_size else places
            turned = angles(count + rows, rotary, device, dtype)
            extra["rotary_cos"], extra["rotary_sin"] = turned
        if slopes is not None:
            extra["alibi_slopes"] = torch.rand(slopes, device=device)
        if sinks:
            extra["sinks"] = torch.randn(heads, device=device)
        extra |= {name: laid[name] for name in ("k_new", "v_new") if name in laid}
        given = lies_lengths.laid(torch.tensor(lengths, dtype=torch.int32, device=device))
        return (laid["query"], laid["k_cache"], laid["v_cache"], given), extra

    words = [f"{name} {sizes(shape)}{layouts[name]}" for name, shape in shapes.items()]
    words += [f"lengths {lengths}{lies_lengths}"]
    words += [f"pages of {page_size}{lies_table}"] if page_size else []
    words += [f"rotary {rotary}"] if rotary else []
    words += [f"{name}={value}" for name, value in kwargs.items()]
    words += [f"slopes {sizes(slopes)}"] if slopes is not None else []
    words += ["sinks"] if sinks else []
    return Sample(", ".join(words), make)


def illegal(choose: Chooser) -> tuple[Sample, str]:
    """A legal call with one thing made wrong."""
    return spoilt(arbitrary(choose), POSITIONAL, choose.choice(FAULTS))


def _appending(given: Arguments) -> Arguments:
    """What a call needs besides to append, whatever it did before: new keys, and their angles."""
    kv_heads = given["k_cache"].shape[1]
    places = given["k_cache"].shape[2]
    table = given.get("block_table")
    count = places * (1 if table is None else table.shape[1])
    batch, dtype = given["query"].shape[0], given["query"].dtype
    caches = {name: given[name].contiguous() for name in ("k_cache", "v_cache")}
    new = {
        name: torch.zeros(batch, kv_heads, 1, caches[cache].shape[3], dtype=dtype)
        for name, cache in (("k_new", "k_cache"), ("v_new", "v_cache"))
    }
    half = given["query"].shape[3] // 2
    cos, sin = torch.ones(2, count, half, dtype=dtype).unbind()
    return {**caches, **new, "rotary_cos": cos, "rotary_sin": sin}


def _new(name: str, what: str, change: Callable[[Any], Any], blamed: str = "") -> Fault:
    """Of a call that appends, one argument is changed."""

    def changed(given: Arguments) -> Arguments:
        legal = _appending(given)
        return legal | {name: change(legal[name])}

    return Fault(blamed or name, what, changed)


def _heads(argument: str) -> Fault:
    def change(given: Arguments) -> Arguments:
        return {argument: torch.ones(given["query"].shape[1] + 1)}

    return Fault(argument, "for another number of heads", change)


def _requires_gradient(name: str) -> Fault:
    return changed(name, "that requires a gradient", lambda t: t.detach().requires_grad_())


def _lengths(what: str, change: Callable[[Tensor], Any]) -> Fault:
    return changed("cache_seqlens", what, change)


def _table(what: str, change: Callable[[Tensor], Any]) -> Fault:
    def tabled(given: Arguments) -> Arguments:
        table = torch.zeros(given["query"].shape[0], 1, dtype=torch.int32)
        return {"block_table": change(table)}

    return Fault("block_table", what, tabled)


def _another_batch(given: Arguments) -> Arguments:
    shape = (given["query"].shape[0] + 1, *given["k_cache"].shape[1:])
    return {"k_cache": given["query"].new_zeros(shape), "block_table": None}


def _too_many(given: Arguments) -> Arguments:
    legal = _appending(given)
    count = len(legal["rotary_cos"]) + 1
    return legal | {name: legal[name].repeat(1, 1, count, 1) for name in ("k_new", "v_new")}


def _only_rotated(given: Arguments) -> Arguments:
    return _appending(given) | {"k_new": None, "v_new": None}


def _expanded(given: Arguments) -> Arguments:
    cache = given["query"].new_zeros(2, 1, 3, 4)
    nothing = ("block_table", "rotary_cos", "rotary_sin", "alibi_slopes", "sinks")
    return {
        "query": cache,
        "k_cache": cache[:, :, :1].expand(cache.shape),
        "v_cache": cache.clone(),
        "cache_seqlens": 0,
        "k_new": cache,
        "v_new": cache,
        **dict.fromkeys(nothing),
    }


CACHES = ("k_cache", "v_cache")
FAULTS = (
    *(fault for name in POSITIONAL[:3] for fault in instead(name, None, 1.0, [[1.0]])),
    *(changed(name, "sparse", lambda t: t.detach().to_sparse()) for name in POSITIONAL[:3]),
    *(changed(name, "of 3 dimensions", lambda t: t[0:1].flatten(0, 1)) for name in POSITIONAL[:3]),
    *(changed(name, "of another dtype", other_dtype) for name in CACHES),
    *(changed(name, "on another device", on_meta) for name in CACHES),
    changed("k_cache", "with another head size", longer(3)),
    changed("v_cache", "with a head more", longer(1)),
    changed("v_cache", "with a row more", longer(2)),
    Fault("k_cache", "of another batch, without a table", _another_batch),
    *instead("cache_seqlens", None, 1.5, -1, "3", [1], True),
    _lengths("of int64", Tensor.long),
    _lengths("of floats", Tensor.float),
    _lengths("one more", longer(0)),
    _lengths("of 2 dimensions", lambda t: t[None]),
    _lengths("on another device", on_meta),
    *instead("block_table", 1, [[0]]),
    _table("of int64", Tensor.long),
    _table("of 1 dimension", lambda t: t.flatten()),
    _table("of a row more", longer(0)),
    _table("on another device", on_meta),
    _new("k_new", "missing", lambda _: None),
    _new("v_new", "missing", lambda _: None),
    *(_new(name, "of another dtype", other_dtype) for name in ("k_new", "v_new")),
    *(_new(name, "with a head more", longer(1)) for name in ("k_new", "v_new")),
    *(_new(name, "of another head size", longer(3)) for name in ("k_new", "v_new")),
    *(_new(name, "not a tensor", lambda _: 1.0) for name in ("k_new", "v_new")),
    _new("v_new", "with a row more", longer(2)),
    Fault("k_new", "longer than the cache", _too_many),
    *(_new(name, "missing", lambda _: None) for name in ("rotary_cos", "rotary_sin")),
    *(_new(name, "of integers", Tensor.long) for name in ("rotary_cos", "rotary_sin")),
    *(_new(name, "of 1 dimension", Tensor.flatten) for name in ("rotary_cos", "rotary_sin")),
    _new("rotary_cos", "with a row less", lambda t: t[1:]),
    _new("rotary_cos", "wider than the head", lambda t: t.repeat(1, 3).new_ones(len(t), 300)),
    _new("rotary_sin", "with a row more", longer(0)),
    *instead("scale", "1", [1.0], 1j),
    *instead("softcap", -1.0, float("nan"), "1", None),
    *instead("window_size", None, 1, (1,), (1, 2, 3), (1.5, 2), "ab"),
    *instead("num_splits", -1, 1.5, None, "2"),
    *(fault for name in ("alibi_slopes", "sinks") for fault in (_heads(name), *instead(name, 1.0))),
    *(_requires_gradient(name) for name in POSITIONAL[:3]),
    _new("k_new", "that requires a gradient", lambda t: t.requires_grad_()),
    Fault("rotary_cos", "without new keys", _only_rotated),
    Fault("k_cache", "expanded, where it is appended to", _expanded),
)
