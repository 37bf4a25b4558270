"""NVTX ranges: what is pushed around an op, and that nothing is left when they are off."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import bigops
from bigops.ops import Backend, Cost, Op, declare


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the ranges so far, "pop" where one ends."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", found.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: found.append("pop"))
    yield found
    bigops.nvtx(False)


def attend() -> None:
    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    bigops.attention(query, query, query).sum().backward()


def test_ranges_of_an_op(pushed: list[str]) -> None:
    before = bigops.ops.get("attention").backends
    attend()  # leaves a route, which must not be taken afterwards
    assert pushed == []
    bigops.nvtx(True)
    pushed.clear()
    attend()
    forward, backward = (f"bigops::attention {what} [native]" for what in ("forward", "backward"))
    assert pushed == [forward, "pop", backward, "pop"]
    bigops.nvtx(False)
    pushed.clear()
    attend()
    assert pushed == []
    assert bigops.ops.get("attention").backends is before


def test_range_of_an_optimizer_step(pushed: list[str]) -> None:
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    bigops.nvtx(True)
    pushed.clear()
    bigops.optim.Adam([param]).step()
    assert pushed == ["bigops::adam step [native]", "pop"]


def test_range_ends_when_the_kernel_raises(
    pushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an op declared while ranges are on, too."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    # The function `declare` hides its module.
    monkeypatch.setattr(importlib.import_module("bigops.ops.declare"), "_table", {})
    monkeypatch.setattr("bigops.ops.ranges._ops", [])
    bigops.nvtx(True)
    backend = Backend("native", ("cpu",), lambda x: None, broken)
    op = declare(Op("broken", broken, broken, (backend,), (), lambda passes, x: Cost(0.0, 0.0)))
    pushed.clear()
    with pytest.raises(ZeroDivisionError):
        op.forward(torch.ones(1))
    assert pushed == ["bigops::broken forward [native]", "pop"]
    bigops.nvtx(False)  # before its op is taken out again


CODE = """
import torch
found = []
{fake}
import bigops
query = torch.randn(1, 1, 4, 8)
bigops.attention(query, query, query)
print(found)
"""
FAKE = """
torch.cuda.nvtx.range_push = found.append
torch.cuda.nvtx.range_pop = lambda: found.append("pop")
"""


def run(fake: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE.format(fake=fake)],
        env=os.environ | {"BIGOPS_NVTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_turns_ranges_on() -> None:
    assert "'bigops::attention forward [native]', 'pop'" in run(FAKE).stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has NVTX")
def test_without_nvtx_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="this torch has no NVTX"):
        bigops.nvtx(True)
    assert run("").stderr.splitlines()[-1].startswith("RuntimeError: BIGOPS_NVTX, bigops.nvtx: ")
