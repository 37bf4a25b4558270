"""Both convolution ops by the error rule, over a matrix of sizes, options and layouts: outputs and
every gradient.

    pytest tests/test_conv2d_matrix.py            # every pair of values
    pytest -m slow tests/test_conv2d_matrix.py    # every combination of what a call takes
"""

from __future__ import annotations

import conv2d_matrix as matrix
import pytest
import torch
from covering import every_pair, pairs

from bigops import check, ops
from bigops.backends import native

NATIVE = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
CASES = 150
COVERING = matrix.covering(CASES)


def test_every_pair_of_values_is_covered() -> None:
    covered = {pair for case in COVERING for pair in pairs(case)}
    assert covered == {pair for pair in every_pair(matrix.FACTORS) if matrix.possible(pair)}


def holds(case: matrix.Case, device: str = "cpu", backend: str = "native") -> None:
    op = ops.get("conv2d_act" if case.pool is None else "conv2d_relu_max_pool2d")
    for found in check.check_arbitrary(op, matrix.sample(case), backend, case.dtype, device):
        assert found.ok, found


@NATIVE
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("case", COVERING, ids=matrix.named)
def test_truth(case: matrix.Case) -> None:
    holds(case)


@NATIVE
@pytest.mark.slow
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("case", matrix.whole(), ids=matrix.named)
def test_truth_of_the_whole_matrix(case: matrix.Case) -> None:
    holds(case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("case", COVERING, ids=matrix.named)
def test_truth_on_a_gpu(case: matrix.Case, backend: str) -> None:
    op = ops.get("conv2d_act" if case.pool is None else "conv2d_relu_max_pool2d")
    if (reason := check.serves(op, matrix.sample(case), backend, case.dtype, "cuda")) is not None:
        pytest.skip(reason)
    holds(case, "cuda", backend)
