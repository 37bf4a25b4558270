"""Rung 5: attention's backward kernels for Hopper, executed on the CPU model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cuda import PACKED, Case, cases
from attention_cuda_backward import backward
from torch import Tensor

from bigops import simt

SOURCES = Path(__file__).parent / "cuda"

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

# Queries and keys of a tile by head size: csrc/cuda/attention_backward_sm90.cu.
TILES = {64: (128, 128), 96: (64, 128), 128: (64, 128), 256: (64, 64)}


@functools.cache
def module(build: str) -> simt.Module:
    return simt.compile(SOURCES / "attention_backward_sm90.cu", build=build)


def workspace_bytes(*args: object) -> int:
    count = torch.zeros(1, dtype=torch.int64)
    assert not module("plain").call("workspace_bytes", *args, count)
    return int(count)


def run(build: str, **how: object) -> functools.partial[None]:
    def call(*args: object) -> None:
        found = module(build).call("backward", *args, **how)  # type: ignore[arg-type]
        assert not found, "\n".join(map(str, found))

    return functools.partial(call)


def check(case: Case, build: str = "plain", **how: Any) -> None:
    judged, _ = backward(case, run(build), workspace_bytes, **how)
    assert all(c.ok for c in judged), judged


@pytest.mark.parametrize(
    "case", [c for size, tile in TILES.items() for c in cases(size, *tile) if c.keys > 1], ids=str
)
def test_backward(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("size", TILES)
def test_single_key(size: int) -> None:
    """Its weight is 1 whatever the scores: two sums of the same products cancel up to rounding."""
    case = Case(queries=1, keys=1, size=size)
    judged, (grad_query, grad_key, _) = backward(case, run("plain"), workspace_bytes)
    assert judged[2].ok, judged
    rounding = torch.finfo(torch.float32).eps * size
    assert max(grad_query.abs().max(), grad_key.abs().max()) < 10 * rounding


@pytest.mark.parametrize("size", TILES)
def test_lse_has_a_gradient(size: int) -> None:
    """Rows that see nothing, whose lse is -inf, take none of it."""
    check(Case(queries=150, keys=100, size=size, causal=True), lse_used=True)


@pytest.mark.parametrize("size", TILES)
def test_far_below_zero(size: int) -> None:
    """exp(0 - lse) overflows: of keys past the end, whose scores are 0, no inf * 0 may come."""
    case = Case(queries=30, keys=70, size=size)
    apart = 150.0**0.5 * size**-0.25  # scores near -150
    judged, grads = backward(case, run("plain"), workspace_bytes, apart=apart)
    assert judged[2].ok, judged
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("size", TILES)
def test_nan_stays_in_its_sequence(size: int) -> None:
    """Tiles reach into the next sequence, in which zeros would not help against NaN."""
    lengths = ((40, 50), (90, 80))
    case = Case(heads=2, size=size, lengths=lengths)
    grads = []
    for value in (1.0, float("nan")):

        def call(*args: Any, value: float = value) -> None:
            for tensor, start in zip(args[:5], (40, 40, 50, 50, 40), strict=True):
                tensor[:, :, start:] = value
            run("plain")(*args)

        torch.manual_seed(0)
        grads.append(backward(case, call, workspace_bytes, deterministic=True)[1])
    for clean, poisoned, length in zip(*grads, (40, 50, 50), strict=True):
        assert torch.equal(clean[:, :, :length], poisoned[:, :, :length])
        assert poisoned[:, :, length:].isnan().any()


@pytest.mark.parametrize("size", TILES)
def test_no_finding(size: int) -> None:
    """Query tiles of several heads go round the ring, some key tiles are empty or seen by none."""
    queries, keys = TILES[size]
    packed = Case(heads=2, size=size, lengths=PACKED[:3], causal=True)
    dense = Case(1, 2, 1, 2 * queries + 1, keys + 1, size, window=(100, 0))
    for case in (packed, dense):
        check(case, "race")
        check(case, "race", deterministic=True)


def test_order_of_threads_does_not_matter() -> None:
    case = Case(2, 4, 2, 300, 300, 128, causal=True)
    found: list[list[Tensor]] = []
    for how in ({}, {"order": "reverse"}, {"order": "shuffled", "seed": 7}, {"workers": 1}):
        torch.manual_seed(0)
        found.append(backward(case, run("plain", **how), workspace_bytes, deterministic=True)[1])
    for grads in found[1:]:
        assert all(map(torch.equal, grads, found[0]))
