"""varlen_attention's samples, its eager baseline and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from . import attention_arguments as given
from . import attention_cases
from .declare import Call, Cost, Sample

PER_SEQUENCE = ("alibi_slopes", "q_descale", "k_descale", "v_descale")


def eager(query: Tensor, key: Tensor, value: Tensor, *packing: Any, **kwargs: Any) -> Any:
    """One sequence after another by torch's own attention."""
    cu_seqlens_q, cu_seqlens_k, *longest = packing
    starts, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    bias = kwargs.get("bias")
    if bias is not None:
        bias = bias.expand(len(starts) - 1, query.shape[1], *longest)
    after, heads = query.shape[0] - starts[-1], query.shape[1]
    outs = [value.new_zeros((starts[0], heads, value.shape[2]))]
    lses = [_unseen(query, starts[0])]
    for b in range(len(starts) - 1):
        rows, keys = slice(*starts[b : b + 2]), slice(*starts_k[b : b + 2])
        one = [t.transpose(0, 1)[None] for t in (query[rows], key[keys], value[keys])]
        own = kwargs | {
            name: kwargs[name][b : b + 1]
            for name in PER_SEQUENCE
            if kwargs.get(name) is not None and kwargs[name].dim() == 2
        }
        if bias is not None:
            own["bias"] = bias[b : b + 1, :, : one[0].shape[2], : one[1].shape[2]]
        found = attention_cases.eager(*one, **own)
        if kwargs.get("return_lse"):
            found, lse = found
            lses.append(lse[0])
        outs.append(found[0].transpose(0, 1))
    out = torch.cat([*outs, value.new_zeros((after, heads, value.shape[2]))])
    if kwargs.get("return_lse"):
        return out, torch.cat([*lses, _unseen(query, after)], dim=1)
    return out


def _unseen(query: Tensor, rows: int) -> Tensor:
    """lse of rows of no sequence."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_full((query.shape[1], rows), float("-inf"), dtype=dtype)


def cost(passes: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Cost:
    """The sum over the sequences; every tensor moves once."""
    starts, starts_k = (_read(t, n) for t, n in zip(rest[:2], (len(query), len(key)), strict=True))
    window = given.bounds(kwargs.get("window_size", (-1, -1)), kwargs.get("causal", False))
    lengths = zip(pairwise(starts), pairwise(starts_k), strict=True)
    pairs = sum(attention_cases.pairs(q[1] - q[0], k[1] - k[0], *window) for q, k in lengths)
    heads, value_size = query.shape[1], value.shape[2]
    forward = 2.0 * heads * pairs * (query.shape[2] + value_size)
    out = len(query) * heads * value_size
    moved = query.element_size() * (query.numel() + key.numel() + value.numel() + out)
    return Cost(forward, moved) if passes == "forward" else Cost(3.5 * forward, 3.0 * moved)


def _read(starts: Tensor, rows: int) -> list[int]:
    """The values; of a tensor that has none, as in FakeTensorMode, those of equal lengths."""
    if type(starts) is Tensor:
        return starts.tolist()
    count = max(1, len(starts) - 1)
    return [rows * b // count for b in range(len(starts))]


def starts(lengths: Sequence[int], before: int = 0, device: str = "cpu") -> Tensor:
    """cu_seqlens of sequences of these lengths, the first of them `before` rows in."""
    return torch.tensor(list(accumulate(lengths, initial=before)), dtype=torch.int32, device=device)


def _sample(
    name: str,
    lengths: Sequence[tuple[int, int]],
    heads: int,
    head_size: int,
    *,
    kv_heads: int | None = None,
    value_size: int | None = None,
    around: int = 0,
    bias: str | None = None,
    slopes: bool = False,
    sinks: bool = False,
    grad: bool = True,
    bench: bool = False,
    gradcheck: bool = False,
    **kwargs: Any,
) -> Sample:
    """lengths: of queries and of keys; around: rows of no sequence before the first."""
    queries, keys = [n for n, _ in lengths], [n for _, n in lengths]
    longest = max(queries, default=0), max(keys, default=0)

    def make(device: str, dtype: torch.dtype) -> Call:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)

        kv = kv_heads or heads
        rows, columns = around + sum(queries), around + sum(keys)
        args = (
            draw(rows, heads, head_size),
            draw(columns, kv, head_size),
            draw(columns, kv, value_size or head_size),
        )
        packing = (starts(n, around, device) for n in (queries, keys))
        extra = dict(kwargs)
        if bias is not None:
            full = (len(lengths), heads, *longest)
            extra["bias"] = draw(*(n if c != "1" else 1 for n, c in zip(full, bias, strict=True)))
        if slopes:
            extra["alibi_slopes"] = torch.rand(len(lengths), heads, device=device) * 0.2
        if sinks:
            extra["sinks"] = draw(heads)
        return (*args, *packing, *longest), extra

    return Sample(name, make, bench=bench, gradcheck=gradcheck)


MIXED = ((7, 7), (1, 1), (64, 64), (33, 33), (130, 130))
UNLIKE = ((7, 20), (65, 3), (0, 9), (12, 0), (40, 131), (1, 64))

SAMPLES = (
    _sample("one row", [(1, 1)], 1, 1),
    _sample("gradcheck", [(3, 4), (2, 5)], 2, 3, gradcheck=True),
    _sample("gradcheck, causal, gqa", [(4, 4), (0, 0), (2, 3)], 2, 2, kv_heads=1, causal=True,
            gradcheck=True),
    _sample("gradcheck, everything", [(3, 4), (0, 2), (4, 2)], 2, 2, kv_heads=1, bias="b1ij",
            slopes=True, sinks=True, softcap=1.5, window_size=(2, 2), return_lse=True,
            gradcheck=True),
    _sample("mixed lengths", MIXED, 2, 32),
    _sample("mixed lengths, causal", MIXED, 2, 64, causal=True),
    _sample("other keys than queries", UNLIKE, 2, 16),
    _sample("other keys, causal, gqa", UNLIKE, 4, 24, kv_heads=2, causal=True, value_size=16),
    _sample("rows of no sequence", UNLIKE, 2, 16, around=5),
    _sample("window", MIXED, 2, 16, window_size=(9, 4)),
    _sample("alibi, softcap", MIXED, 2, 16, slopes=True, softcap=2.0),
    _sample("bias", UNLIKE, 2, 16, bias="1hij"),
    _sample("sinks, lse", UNLIKE, 2, 16, sinks=True, return_lse=True),
    _sample("dropout", MIXED, 2, 16, dropout_p=0.3, causal=True),
    _sample("no sequence", (), 2, 16),
    _sample("one sequence", [(70, 70)], 2, 32, causal=True),
    _sample("8 sequences of 128 to 1024", [(128 * n, 128 * n) for n in range(1, 9)], 8, 64,
            causal=True, bench=True),
)  # fmt: skip


def _packed(count: int, length: int) -> Sample:
    name = f"{count} sequences of {length}"
    return _sample(name, [(length, length)] * count, 8, 64, causal=True, bench=True)


SWEEPS = {
    "S": lambda size, device: _packed(4, size),
    "B": lambda size, device: _packed(size, 512),
}
