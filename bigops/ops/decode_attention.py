"""decode_attention: new queries against a cache of keys and values, to which new ones are appended.

The torch op takes the causal bound as the window's right side, and every tensor before the numbers.
It writes into the caches and has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import native, triton
from ..reference.decode_attention import decode_attention as reference
from . import arguments, configurations, route
from . import attention_arguments as shared
from . import decode_attention_arguments as checks
from . import decode_attention_cases as cases
from . import decode_attention_fuzz as fuzz
from .arguments import ArgumentError
from .attention import empty_outputs
from .declare import Backend, Op, declare
from .dispatch import is_fast

MAX_HEAD_SIZE = 256
FURTHEST = 2**22  # from one element of a row to the next: offsets within it are 32-bit
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window_size: tuple[int, int] = shared.NO_WINDOW,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries (usually one) over each sequence's cached keys and values.

    Args:
        query: (B, H, Sq, D), float32, bfloat16, float16 or (native) float64; any strides, as of
            all tensors here: flash_attn's (B, S, H, D) comes as its transpose(1, 2).
        k_cache, v_cache: (B, Hk, S_max, D) and (B, Hk, S_max, Dv); H must be a multiple of Hk.
            With block_table (num_pages, Hk, page_size, D) and Dv, pages of any size.
        cache_seqlens: (B,) int32, how many keys of each sequence are in the cache already; an int
            holds for all.
        k_new, v_new: (B, Hk, Snew, D) and Dv, written in place into the caches at positions
            cache_seqlens[b] and on, and attended to. cache_seqlens itself is left as it is.
        block_table: (B, max_pages) int32: key j of sequence b is row j % page_size of page
            block_table[b, j // page_size]. Entries beyond a sequence's keys may hold anything.
        rotary_cos, rotary_sin: (positions, R / 2) with R <= D, in query's dtype or float32: the
            first R elements of new keys are rotated by the angles of their position, those of query
            t by position cache_seqlens[b] + t (causal, or with a window) or cache_seqlens[b]. A
            window that no key of the cache can be beyond is none, as flash_attn has it.
            They need k_new, and a row for each of the cache's places.
        rotary_interleaved: pairs are neighbours, not elements d and d + R / 2.
        causal: with N = cache_seqlens[b] + Snew, query t sees key j iff j <= t + N - Sq: aligned
            bottom-right.
        window_size: (left, right): keys from t + N - Sq - left to t + N - Sq + right are seen; -1
            is no bound.
        scale: factor of the scores; None is 1/sqrt(D).
        softcap: c > 0 replaces the scores s by c * tanh(s / c).
        alibi_slopes: (H,) or (B, H): minus slope * |t + N - Sq - j| is added to the scores.
        sinks: (H,): one more score per head in the softmax' denominator.
        num_splits: into how many parts, combined exactly, the keys of a sequence are cut; 0 lets
            the kernel choose. The result is the same to rounding.
        return_lse: also return the log-sum-exp of each row's scores, (B, H, Sq), float32 (float64
            for float64), natural logarithm.

    Returns:
        (B, H, Sq, Dv), or (out, lse). A row that sees no key gives 0 and lse -inf (its sink).

    Raises:
        TypeError, ValueError: naming the argument that is wrong, before anything is written. That
            the lengths fit the cache and the table holds pages of it is checked on the CPU only; on
            a GPU, where reading them would wait for it, such keys are not written, and others of
            the cache are read in their place.
        ValueError: an input requires a gradient while autograd records: there is none. (flash_attn
            drops it silently.)

    On the CPU a sequence gives the same bits in any batch, on any number of threads and in pages of
    any size, num_splits left alone.

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; Kwon et al. 2023,
    "Efficient memory management for large language model serving with PagedAttention"; semantics of
    flash_attn_with_kvcache.

    Example:
        >>> k_cache, v_cache = torch.randn(2, 4, 8, 1024, 64).unbind()
        >>> lengths = torch.tensor([100, 7, 0, 900], dtype=torch.int32)
        >>> query, k_new, v_new = torch.randn(3, 4, 8, 1, 64).unbind()
        >>> new = {"k_new": k_new, "v_new": v_new}
        >>> bigops.decode_attention(query, k_cache, v_cache, lengths, **new).shape
        torch.Size([4, 8, 1, 64])
    """
    # Any: an int of lengths is no tensor; find and leave are not asked then.
    tensors: Any = (
        query, k_cache, v_cache, cache_seqlens, k_new, v_new, block_table, rotary_cos, rotary_sin,
        alibi_slopes, sinks,
    )  # fmt: skip
    options = (rotary_interleaved, causal, window_size, scale, softcap, num_splits)
    # An int of lengths becomes a tensor first: such a call is checked each time.
    short = isinstance(cache_seqlens, Tensor)
    if short and (known := route.find(OP, tensors, options)) is not None:
        out, lse = known(*tensors)
        return (out, lse) if return_lse else out
    for name, given in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        arguments.tensor(name, given, dims=4)
    paged = block_table is not None
    # Caches are left as they are under autocast: a copy of one would be appended to in vain.
    checks.check_cache(query, k_cache, v_cache, paged)
    cache_seqlens = checks.lengths(cache_seqlens, query)
    capacity = page_size = k_cache.shape[2]
    if block_table is not None:
        checks.check_table(block_table, query, page_size)
        capacity = block_table.shape[1] * page_size
    checks.check_new(k_new, v_new, query, k_cache, v_cache, capacity)
    checks.check_rotary(rotary_cos, rotary_sin, query, k_new is not None, capacity)
    alibi_slopes = checks.slopes(alibi_slopes, query)
    sinks = shared.sinks(sinks, query, query.shape[1])
    left, right = checks.window(window_size, causal, capacity)
    scale = shared.numbers(scale, softcap, query.shape[3])
    if not isinstance(num_splits, int):
        raise TypeError(f"num_splits must be an int, got {num_splits!r}")
    if num_splits < 0:
        raise ArgumentError(f"num_splits must be 0 (the kernel's choice) or more, got {num_splits}")
    checks.no_gradient(
        query=query, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    call = (
        query, k_cache, v_cache, cache_seqlens, k_new, v_new, block_table, rotary_cos, rotary_sin,
        alibi_slopes, sinks, bool(rotary_interleaved), left, right, scale, float(softcap),
        num_splits,
    )  # fmt: skip
    if is_fast(OP, call):
        if short:
            route.leave(OP, tensors, options, call)
        out, lse = OP.call(*call)
    else:
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            new = 0 if k_new is None else k_new.shape[2]
            checks.check_values(
                cache_seqlens, capacity, new, block_table, page_size, k_cache.shape[0]
            )
        out, lse = reference(*call[:-1])
    return (out, lse) if return_lse else out


def _fake(query: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(query, v_cache)


def _written(k_cache: Tensor, v_cache: Tensor, k_new: Tensor | None) -> None:
    """Autograd must notice that a cache which it may have saved has changed."""
    if k_new is not None:
        increment_version((k_cache, v_cache))


def _native_forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(args[0], args[2])
    native.kernels.decode_attention(*args, out, lse)
    _written(args[1], args[2], args[4])
    return out, lse


def _native_why_not(query: Tensor, *_: Any) -> str | None:
    return native.why_not() or _dtype(query, (*DTYPES, torch.float64))


def _triton_why_not(query: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> str | None:
    if max(query.shape[3], v_cache.shape[3]) > MAX_HEAD_SIZE:
        return f"head sizes above {MAX_HEAD_SIZE}"
    if any(t.stride(3) > FURTHEST for t in (query, k_cache, v_cache)):
        return "elements of a row this far apart"
    return triton.why_not(query.device.type) or _dtype(query, DTYPES)


def _dtype(query: Tensor, served: tuple[torch.dtype, ...]) -> str | None:
    return None if query.dtype in served else f"dtype {query.dtype}"


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import decode_attention as kernels

    found = kernels.forward(*args)
    _written(args[1], args[2], args[4])
    return found


def _reference_bytes(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> int:
    batch, heads, rows, _ = query.shape
    table = rest[3]
    keys = k_cache.shape[2] * (1 if table is None else table.shape[1])
    copies = batch * heads * keys * (query.shape[3] + v_cache.shape[3]) * query.element_size()
    return copies + 2 * batch * heads * rows * keys * 4


OP = declare(
    Op(
        name="decode_attention",
        schema="(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
        "Tensor? k_new, Tensor? v_new, Tensor? block_table, Tensor? rotary_cos, "
        "Tensor? rotary_sin, Tensor? alibi_slopes, Tensor? sinks, bool rotary_interleaved, "
        "SymInt left, SymInt right, float scale, float softcap, SymInt num_splits) "
        "-> (Tensor, Tensor)",
        function=decode_attention,
        eager=cases.eager,
        backends=(
            Backend("native", ("cpu",), _native_why_not, _native_forward),
            Backend("triton", ("cuda", "cpu"), _triton_why_not, _triton_forward),
        ),
        fake=_fake,
        samples=cases.SAMPLES,
        arbitrary=fuzz.arbitrary,
        illegal=fuzz.illegal,
        sweeps=cases.SWEEPS,
        configurations=configurations.decode_attention,
        dtypes=DTYPES,
        cost=cases.cost,
        reference_bytes=_reference_bytes,
        mutates=("k_cache", "v_cache"),
    )
)
