"""combine_attention's own promises: parts of attention over disjoint keys give the whole."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bigops
from bigops import check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
INTERPRETER = runpy.run_path(str(Path(__file__).with_name("interpreter.py")))


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    with bigops.use_backend(BACKEND):
        yield


def parts_of(query: Tensor, key: Tensor, value: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """attention over the keys between the cuts, by the reference, combined by our kernel."""
    found = []
    for start, end in zip([0, *cuts], [*cuts, key.shape[2]], strict=True):
        some = slice(start, end)
        with bigops.use_backend("reference"):
            part = bigops.attention(query, key[:, :, some], value[:, :, some], return_lse=True)
        found.append(part)
    outs, lses = zip(*found, strict=True)
    return bigops.combine_attention(outs, lses)


@pytest.mark.parametrize("cuts", [[], [5], [1, 1, 30], [0, 40]])  # with parts of no key at all
def test_parts_give_the_whole_and_its_gradients(cuts: list[int]) -> None:
    query, key, value = torch.randn(3, 2, 3, 40, 24).unbind()
    weight, weight_lse = torch.randn(2, 3, 40, 24), torch.randn(2, 3, 40)

    def run(combined: bool, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (query, key, value)]
        if combined:
            out, lse = parts_of(*leaves, cuts)
        else:
            with bigops.use_backend("reference"):
                out, lse = bigops.attention(*leaves, return_lse=True)
        loss = (out * weight).sum() + (lse * weight_lse).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    ours, eager = run(True, torch.float32), run(False, torch.float32)
    wide = run(False, torch.float64)
    names = ("out", "lse", "grad query", "grad key", "grad value")
    for name, got, theirs, want in zip(names, ours, eager, wide, strict=True):
        found = check.compare(name, got, theirs, want)
        assert found.ok, found


def test_what_saw_nothing_weighs_nothing() -> None:
    """Even where its out is NaN; and where no part saw anything the result is 0 and -inf."""
    outs, lses = torch.randn(3, 1, 2, 4, 8), torch.randn(3, 1, 2, 4)
    lses[1], outs[1] = float("-inf"), float("nan")
    lses[:, :, :, 0] = float("-inf")
    leaves = [outs.requires_grad_(), lses.requires_grad_()]
    out, lse = bigops.combine_attention(*leaves)
    assert out.isfinite().all()
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == float("-inf")).all()
    grads = torch.autograd.grad((out.sum(), lse[:, :, 1:].sum()), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][1] == 0).all()
    assert (grads[1][1] == 0).all()
    assert (grads[0][:, :, :, 0] == 0).all()


def test_one_part_is_itself() -> None:
    outs, lses = torch.randn(1, 2, 3, 5, 16), 30 * torch.randn(1, 2, 3, 5)
    out, lse = bigops.combine_attention(outs, lses)
    assert torch.equal(out, outs[0])
    assert check.compare("lse", lse, lses[0], lses[0].double()).ok
    assert out.data_ptr() != outs.data_ptr()


def test_only_needed_gradients() -> None:
    outs, lses = torch.randn(3, 1, 2, 4, 8), torch.randn(3, 1, 2, 4)
    grad_out, grad_lse = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4)
    backward = torch.ops.bigops.combine_attention_backward
    both = backward(grad_out, grad_lse, outs, lses, [True, True])
    for i, needs in enumerate(([True, False], [False, True])):
        found = backward(grad_out, grad_lse, outs, lses, needs)
        assert found[1 - i] is None
        assert torch.equal(found[i], both[i])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_interpreted() -> None:
    """The same on Triton's interpreter."""
    print(INTERPRETER["session"](__file__, at_least=7).splitlines()[-1])
