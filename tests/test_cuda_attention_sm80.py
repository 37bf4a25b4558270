"""Rung 5: attention's kernels by mma.sync, executed on the CPU model."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cuda import Case, cases, forward
from attention_cuda_backward import backward
from torch import Tensor

from bigops import simt
from bigops.check import Comparison

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
    """Tiles for 100 KB run the same code: of their cases every other one."""
    return [
        pytest.param(shorter(case), large, id=f"{shorter(case)}{'' if large else ' 100 KB'}")
        for (size, large), tile in tiles.items()
        for case in cases(size, *tile)[:: 1 if large else 2]
    ]


def shorter(case: Case) -> Case:
    """Packed sequences of head sizes beyond 64 are fewer: the reference takes most of the time."""
    few = case.lengths and case.size != 64
    return replace(case, heads=2, kv_heads=1, lengths=PACKED) if few else case


def calls(name: str, build: str, large: int, **how: object) -> functools.partial[None]:
    def call(*args: object) -> None:
        found = module(name, build).call(name, *args, large, **how)  # type: ignore[arg-type]
        assert not found, "\n".join(map(str, found))

    return functools.partial(call)


def judge(
    case: Case, run: Any, large: int, **options: Any
) -> tuple[list[Comparison], list[Tensor]]:
    def workspace_bytes(*args: object) -> int:
        count = torch.zeros(1, dtype=torch.int64)
        assert not module("backward", "plain").call("workspace_bytes", *args, large, count)
        return int(count)

    return backward(case, run, workspace_bytes, **options)


def gradients(
    case: Case,
    large: int,
    build: str = "plain",
    how: dict[str, object] | None = None,
    **options: Any,
) -> list[Tensor]:
    run = calls("backward", build, large, **(how or {}))
    judged, got = judge(case, run, large, **options)
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


@pytest.mark.parametrize(("size", "large"), BACKWARD)
def test_far_below_zero(size: int, large: int) -> None:
    """exp(0 - lse) overflows: of keys past the end, whose scores are 0, no inf * 0 may come."""
    case = Case(queries=30, keys=BACKWARD[size, large][1] - 20, size=size)
    apart = 150.0**0.5 * size**-0.25  # scores near -150
    judged, grads = judge(case, calls("backward", "plain", large), large, apart=apart)
    assert judged[2].ok, judged
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("size", "large"), [(64, 1), (256, 0)])
def test_nan_stays_in_its_sequence(size: int, large: int) -> None:
    """Tiles end within the next sequence."""
    case = Case(heads=2, size=size, lengths=((40, 50), (90, 80)))
    results: list[list[Tensor]] = []
    for value in (1.0, float("nan")):

        def poison(tensors: tuple[Any, ...], starts: tuple[int, ...], value: float = value) -> None:
            for tensor, start in zip(tensors, starts, strict=True):
                tensor[:, :, start:] = value

        def run_forward(*args: Any) -> None:
            poison(args[:3], (40, 50, 50))
            calls("forward", "plain", large)(*args)

        def run_backward(*args: Any) -> None:
            poison(args[:5], (40, 40, 50, 50, 40))
            calls("backward", "plain", large)(*args)

        torch.manual_seed(0)
        found = list(forward(case, run_forward)[1:])
        found += judge(case, run_backward, large, deterministic=True)[1]
        results.append(found)
    for clean, poisoned, length in zip(*results, (40, 40, 40, 50, 50), strict=True):
        assert torch.equal(clean[:, :, :length], poisoned[:, :, :length])
        assert poisoned[:, :, length:].isnan().any()


@pytest.mark.parametrize(("size", "large"), [(64, 1), (256, 1)])
def test_forward_has_no_finding(size: int, large: int) -> None:
    """A ring of three slots, and one of two."""
    rows, keys = FORWARD[size, large]
    packed = Case(heads=2, size=size, lengths=PACKED, causal=True)
    dense = Case(1, 2, 1, rows + 1, 4 * keys + 1, size, window=(100, 0))
    for case in (packed, dense):
        judged, _, _ = forward(case, calls("forward", "race", large))
        assert all(c.ok for c in judged), judged


@pytest.mark.parametrize(("size", "large"), [(64, 1), (96, 1), (256, 0)])
def test_backward_has_no_finding(size: int, large: int) -> None:
    """Tiles of several heads, two stages and one; the last keys are cut off."""
    rows, keys = BACKWARD[size, large]
    case = Case(1, 2, 1, rows + 1, keys // 2 + 1, size, window=(rows, 0), softcap=20.0)
    gradients(case, large, "race")


@pytest.mark.parametrize("lengths", [(), PACKED], ids=["", "packed"])
def test_fixed_order_has_no_finding(lengths: tuple[tuple[int, int], ...]) -> None:
    """One block after the other: checked, a block can take longer than the model waits for it."""
    case = Case(1, 1, 1, 65, 70, 256, causal=True, lengths=lengths)
    gradients(case, 0, "race", {"workers": 1}, deterministic=True)


def test_order_of_threads_does_not_matter() -> None:
    case = Case(1, 2, 1, 130, 200, 64, causal=True)
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
