"""Rung 5: attention's kernels for Hopper, executed on the CPU model."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from attention_cuda import Case, cases, forward

from bigops import simt

SOURCES = Path(__file__).parent / "cuda"

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

# (head size, rows, keys) of a tile: csrc/cuda/attention_sm90.cu.
TILES = ((64, 192, 128), (96, 128, 128), (128, 128, 128), (256, 128, 80))


@functools.cache
def module(build: str) -> simt.Module:
    return simt.compile(SOURCES / "attention_forward_sm90.cu", build=build)


def run(build: str, **how: object) -> functools.partial[list[simt.Finding]]:
    workspace = torch.empty(4, dtype=torch.int32)

    def call(*args: object) -> None:
        found = module(build).call("forward", *args, workspace, **how)  # type: ignore[arg-type]
        assert not found, "\n".join(map(str, found))

    return functools.partial(call)


@pytest.mark.parametrize(
    "case", list(dict.fromkeys(c for tile in TILES for c in cases(*tile))), ids=str
)
def test_forward(case: Case) -> None:
    judged, _, _ = forward(case, run("plain"))
    assert all(c.ok for c in judged), judged


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_forward_has_no_finding(tile: tuple[int, int, int]) -> None:
    """More tiles than the model has multiprocessors, some of them empty."""
    size, rows, _ = tile
    lengths = ((5, 5), (0, 7), (130, 300), (70, 33), (1, 0))
    packed = Case(heads=4, kv_heads=2, size=size, lengths=lengths, causal=True)
    dense = Case(2, 2, 1, 2 * rows, 257, size, window=(100, 0))
    for case in (packed, dense):
        judged, _, _ = forward(case, run("race"))
        assert all(c.ok for c in judged), judged


def test_order_of_threads_does_not_matter() -> None:
    case = Case(2, 2, 1, 300, 300, 128, causal=True)
    found = []
    for how in ({}, {"order": "reverse"}, {"order": "shuffled", "seed": 7}, {"workers": 1}):
        torch.manual_seed(0)
        found.append(forward(case, run("plain", **how))[1:])
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])
