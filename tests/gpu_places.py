"""Where a test of rung 7 runs: (device, backend)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bigops
from bigops.backends import cuda

Place = tuple[str, str]

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
BUILT = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))
CPU = pytest.param(("cpu", "native"), id="cpu-native")


def backends(*names: str) -> list[str]:
    """The backends that have kernels of all these ops for a GPU."""
    ops = [bigops.ops.get(name) for name in names]
    found = [{b.name for b in op.backends if "cuda" in b.devices} for op in ops]
    return sorted(set.intersection(*found))


ANY = sorted({backend for name in bigops.ops.table() for backend in backends(name)})


def gpu_only(*names: str) -> Any:
    """On each backend that has these ops on a GPU; on any backend, if none is named."""
    return pytest.mark.parametrize("place", _gpu(*names))


def anywhere(*names: str) -> Any:
    """The same, and on the native kernels of a CPU."""
    return pytest.mark.parametrize("place", [CPU, *_gpu(*names)])


def _gpu(*names: str) -> list[Any]:
    chosen = backends(*names) if names else ANY
    marks = {name: [*MARKS, BUILT] if name == "native" else MARKS for name in chosen}
    return [pytest.param(("cuda", n), marks=marks[n], id=f"cuda-{n}") for n in chosen]
