"""Rung 5: attention's kernels by mma.sync, executed on the CPU model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cuda import Case, cases, forward
from attention_cuda_backward import backward
from torch import Tensor

from bigops import simt

SOURCES = Path(__file__).parent / "cuda"

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

# Rows and keys of a tile by head size, for multiprocessors of 164 KB of shared memory and more (1)
# or of 100 KB (0): csrc/cuda/attention_sm80.cu and csrc/cuda/attention_backward_sm80.cu.
FORWARD = {
    (64, 1): (128, 64),
    (96, 1): (128, 64),
    (128, 1): (128, 64),
    (128, 0): (128, 32),
    (256, 1): (128, 64),
    (256, 0): (64, 64),
}
BACKWARD = {
    (64, 1): (64, 128),
    (96, 1): (64, 128),
    (96, 0): (64, 64),
    (128, 1): (64, 128),
    (128, 0): (32, 64),
    (256, 1): (32, 64),
    (256, 0): (32, 32),
}
PACKED = ((5, 5), (0, 7), (70, 80), (1, 0))
ORDERS = ({}, {"order": "reverse"}, {"order": "shuffled", "seed": 7}, {"workers": 1})


@functools.cache
def module(name: str, build: str) -> simt.Module:
    return simt.compile(SOURCES / f"attention_{name}_sm80.cu", build=build)


def params(tiles: dict[tuple[int, int], tuple[int, int]]) -> list[Any]:
    return [
        pytest.param(case, large, id=f"{case}{'' if large else ' 100 KB'}")
        for (size, large), tile in tiles.items()
        for case in cases(size, *tile)
    ]


def calls(name: str, build: str, large: int, **how: object) -> functools.partial[None]:
    def call(*args: object) -> None:
        found = module(name, build).call(name, *args, large, **how)  # type: ignore[arg-type]
        assert not found, "\n".join(map(str, found))

    return functools.partial(call)


def gradients(
    case: Case,
    large: int,
    build: str = "plain",
    how: dict[str, object] | None = None,
    **options: bool,
) -> list[Tensor]:
    def workspace_bytes(*args: object) -> int:
        count = torch.zeros(1, dtype=torch.int64)
        assert not module("backward", build).call("workspace_bytes", *args, large, count)
        return int(count)

    run = calls("backward", build, large, **(how or {}))
    judged, got = backward(case, run, workspace_bytes, **options)
    assert all(c.ok for c in judged), judged
    return got


@pytest.mark.parametrize(("case", "large"), params(FORWARD))
def test_forward(case: Case, large: int) -> None:
    judged, _, _ = forward(case, calls("forward", "plain", large))
    assert all(c.ok for c in judged), judged


@pytest.mark.parametrize(("case", "large"), params(BACKWARD))
def test_backward(case: Case, large: int) -> None:
    # Of a single key the gradients of query and key are nothing but rounding, unless lse has one.
    gradients(case, large, lse_used=case.keys == 1)


@pytest.mark.parametrize(("size", "large"), BACKWARD)
def test_backward_of_lse_in_a_fixed_order(size: int, large: int) -> None:
    """Rows that see nothing, whose lse is -inf, take none of its gradient."""
    case = Case(queries=150, keys=140, size=size, causal=True)
    gradients(case, large, lse_used=True, deterministic=True)


@pytest.mark.parametrize(("size", "large"), FORWARD)
def test_forward_has_no_finding(size: int, large: int) -> None:
    rows, keys = FORWARD[size, large]
    packed = Case(heads=2, size=size, lengths=PACKED, causal=True)
    dense = Case(1, 2, 1, rows + 1, 4 * keys + 1, size, window=(100, 0))
    for case in (packed, dense):
        judged, _, _ = forward(case, calls("forward", "race", large))
        assert all(c.ok for c in judged), judged


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(("size", "large"), BACKWARD)
def test_backward_has_no_finding(size: int, large: int, deterministic: bool) -> None:
    """Tiles of several heads and both stages; some keys are seen by no query."""
    rows, keys = BACKWARD[size, large]
    case = Case(1, 2, 1, 2 * rows + 1, keys + 1, size, window=(rows, 0), softcap=20.0)
    gradients(case, large, "race", deterministic=deterministic)


def test_no_finding_in_packed_sequences() -> None:
    gradients(Case(heads=2, size=64, lengths=PACKED, causal=True), 1, "race", deterministic=True)


def test_order_of_threads_does_not_matter() -> None:
    case = Case(2, 4, 2, 200, 300, 128, causal=True)
    outs: list[tuple[Tensor, Tensor]] = []
    grads: list[list[Tensor]] = []
    for how in ORDERS:
        torch.manual_seed(0)
        outs.append(forward(case, calls("forward", "plain", 1, **how))[1:])
        grads.append(gradients(case, 1, how=how, deterministic=True))
    for out in outs[1:]:
        assert all(map(torch.equal, out, outs[0]))
    for grad in grads[1:]:
        assert all(map(torch.equal, grad, grads[0]))
