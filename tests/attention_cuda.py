"""Cases of attention for CUDA C++ kernels, judged against float64 on whatever runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigops.check import Comparison, compare
from bigops.reference.attention import attention as reference

# query, key, value, out, lse, scale, offset, left, right, softcap,
# cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
Run = Callable[..., object]


@dataclass(frozen=True)
class Case:
    """One call: (batch, heads, key heads, queries, keys, head size), and its options.

    lengths: of packed sequences, (queries, keys) of each; batch, queries and keys are then unused.
    """

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int = 130
    keys: int = 200
    size: int = 64
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    lengths: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = torch.bfloat16
    amplitude: float = 1.0  # of the queries: large ones make maxima of rows grow by much

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.heads}:{self.kv_heads}x{self.queries}:{self.keys}"
        if self.lengths:
            shape = f"{self.heads}:{self.kv_heads} packed " + " ".join(
                f"{q}:{k}" for q, k in self.lengths
            )
        words = [f"{shape}x{self.size}", str(self.dtype).removeprefix("torch.")]
        words += ["causal"] * self.causal
        words += [f"window {self.window[0]},{self.window[1]}"] * (self.window != (-1, -1))
        words += [f"queries {self.amplitude:g} times as large"] * (self.amplitude != 1.0)
        words += [f"softcap {self.softcap:g}"] * (self.softcap > 0.0)
        return " ".join(words)


PACKED = ((5, 5), (0, 7), (130, 200), (70, 33), (1, 0), (64, 64))


def cases(size: int, rows: int, keys: int) -> list[Case]:
    """What crosses the borders of a kernel's tiles of `rows` and `keys`, and every feature."""
    found = [
        Case(queries=rows + i, keys=keys + j, size=size)
        for i, j in ((-1, -1), (0, 0), (1, 1), (-1, 1), (1, -1))
    ]
    found += [
        Case(queries=1, keys=1, size=size),
        Case(queries=rows + 1, keys=2 * keys + 1, size=size, causal=True),
        Case(queries=2 * rows + 5, keys=keys - 3, size=size, causal=True),  # first rows see nothing
        Case(2, 4, 2, rows + 9, rows + 9, size, causal=True, dtype=torch.float16),
        Case(queries=rows + 30, keys=3 * keys + 1, size=size, window=(40, 0)),
        Case(queries=rows, keys=2 * keys, size=size, window=(keys, 7), dtype=torch.float16),
        Case(queries=rows + 1, keys=keys + 70, size=size, softcap=15.0, causal=True),
        Case(queries=rows, keys=6 * keys, size=size, amplitude=20.0),
        Case(heads=4, kv_heads=2, size=size, lengths=PACKED),
        Case(heads=4, kv_heads=2, size=size, lengths=PACKED, causal=True),
    ]
    return found


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value as (B, H, S, D) views of (B, S, H, D) memory."""
    batch, queries, keys = case.batch, case.queries, case.keys
    if case.lengths:
        batch, queries, keys = 1, sum(q for q, _ in case.lengths), sum(k for _, k in case.lengths)

    def draw(length: int, heads: int, amplitude: float = 1.0) -> Tensor:
        t = amplitude * torch.randn(batch, length, heads, case.size, device=device)
        return t.to(case.dtype).transpose(1, 2)

    return (
        draw(queries, case.heads, case.amplitude),
        draw(keys, case.kv_heads),
        draw(keys, case.kv_heads),
    )


def expected(
    case: Case, query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The reference's out and lse in this dtype."""
    if not case.lengths:
        return _one(case, query.to(dtype), key.to(dtype), value.to(dtype))
    outs, lses, i, j = [], [], 0, 0
    for q, k in case.lengths:
        parts = query[:, :, i : i + q], key[:, :, j : j + k], value[:, :, j : j + k]
        out, lse = _one(case, *(t.to(dtype) for t in parts))
        outs.append(out)
        lses.append(lse)
        i, j = i + q, j + k
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _one(case: Case, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    left, right = case.window
    right = 0 if case.causal else right
    scale, softcap = 1.0 / math.sqrt(case.size), case.softcap
    return reference(query, key, value, left=left, right=right, scale=scale, softcap=softcap)


def options(case: Case, query: Tensor, key: Tensor) -> tuple[float, int, int, int, float]:
    """scale, offset, left, right, softcap as the launchers take them."""
    left, right = case.window
    right = 0 if case.causal else right
    return 1.0 / math.sqrt(case.size), key.shape[2] - query.shape[2], left, right, case.softcap


def starts(case: Case, device: str) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cu_seqlens_q, cu_seqlens_k and the longest of each."""
    if not case.lengths:
        return None, None, 0, 0
    queries, keys = ([0, *(pair[i] for pair in case.lengths)] for i in (0, 1))
    both = (torch.tensor(n, device=device).cumsum(0).int() for n in (queries, keys))
    return (*both, max(queries), max(keys))  # type: ignore[return-value]


def forward(case: Case, run: Run, device: str = "cpu") -> tuple[list[Comparison], Tensor, Tensor]:
    """Run a case and compare out and lse; fresh memory is NaN, so what is not written is seen."""
    query, key, value = inputs(case, device)
    out = torch.full_like(query, float("nan"))
    lse = torch.full(query.shape[:3], float("nan"), dtype=torch.float32, device=device)
    run(query, key, value, out, lse, *options(case, query, key), *starts(case, device))
    want, want_lse = expected(case, query, key, value, torch.float64)
    eager, eager_lse = expected(case, query, key, value, case.dtype)
    judged = [compare("out", out, eager, want), compare("lse", lse, eager_lse, want_lse)]
    return judged, out, lse
