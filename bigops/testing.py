"""For the tests of an op of one's own: every backend that runs here, held to the rules of bigops.

    @pytest.mark.parametrize("case", bigops.testing.cases(OP), ids=str)
    def test_truth(case):
        case.check()

Imported where there is no GPU, and before Triton is, it has Triton interpret its kernels in this
process. What does not run here raises unittest.SkipTest with the reason, to pytest a skip.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

import torch
from torch.library import opcheck

from . import check, extension
from .backends import triton
from .ops import Op, Sample, use_backend
from .ops.dispatch import decision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and triton.INSTALLED and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
    triton.INTERPRETED = True
if triton.INTERPRETED:
    from .backends import interpreter

    interpreter.apply()


@dataclass(frozen=True)
class Case:
    """One sample of an op on one backend in one dtype."""

    op: Op
    sample: Sample
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name}-{self.backend}-{dtype}-{self.sample.name}"

    def check(self) -> None:
        """AssertionError naming the worst element, if an output or a gradient is off its limit."""
        _require(self.op, self.sample, self.backend, self.dtype)
        torch.manual_seed(check.SEED)
        with check.nan_memory():
            found = check.check_sample(self.op, self.sample, self.backend, self.dtype, DEVICE)
        for comparison in found:
            assert comparison.ok, f"{self}: {comparison}"


def cases(op: Op) -> list[Case]:
    """Every small sample x backend x dtype of the op."""
    backends = dict.fromkeys(backend.name for backend in op.backends if DEVICE in backend.devices)
    return [Case(*case) for case in check.cases([op], list(backends))]


def check_torch(op: Op, backend: str) -> None:
    """What torch asks of an op, on the op's samples with `gradcheck`: torch.library.opcheck passes,
    torch.compile traces through the function, and gradients agree with finite differences where the
    backend computes in float64."""
    served = 0
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    for sample in op.samples:
        if not sample.gradcheck:
            continue
        for dtype in (torch.float32, torch.float64):
            if check.serves(op, sample, backend, dtype, DEVICE) is not None:
                continue
            args, kwargs = sample.make(DEVICE, dtype)
            with use_backend(backend):
                _, op_args, _ = decision(op.function, *args, **kwargs)
                opcheck(getattr(torch.ops.bigops, op.name).default, op_args)
                expected = op.function(*args, **kwargs)
                torch.testing.assert_close(compiled(*args, **kwargs), expected, rtol=0, atol=0)
                if dtype == torch.float64:
                    torch.autograd.gradcheck(lambda *a, k=kwargs: op.function(*a, **k), args)
            served += 1
    if not served:
        _require(op, next(s for s in op.samples if s.gradcheck), backend, torch.float32)


def check_builds(name: str, sources: Sequence[Path]) -> None:
    """The sources compile to a module; it is not imported."""
    cuda = any(path.suffix == ".cu" for path in sources)
    if (reason := extension.why_not("cuda" if cuda else "cpu")) is not None:
        raise SkipTest(reason)
    assert extension.build(name, sources).is_file()


def _require(op: Op, sample: Sample, backend: str, dtype: torch.dtype) -> None:
    if (reason := check.serves(op, sample, backend, dtype, DEVICE)) is not None:
        raise SkipTest(f"{backend}: {reason}")
