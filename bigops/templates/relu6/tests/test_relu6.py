"""relu6 on every backend that runs here: its truth, and what torch expects of an op."""

import bigops.testing
import pytest
import torch

import relu6
from relu6.native import SOURCES  # --cuda


@pytest.mark.parametrize("case", bigops.testing.cases(relu6.OP), ids=str)
def test_truth(case: bigops.testing.Case) -> None:
    case.check()


@pytest.mark.parametrize("backend", sorted({backend.name for backend in relu6.OP.backends}))
def test_torch(backend: str) -> None:
    bigops.testing.check_torch(relu6.OP, backend)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="x must be"):
        relu6.relu6([1.0])
    with pytest.raises(ValueError, match="x must be floating"):
        relu6.relu6(torch.ones(3, dtype=torch.int64))


def test_cuda_compiles() -> None:  # --cuda
    bigops.testing.check_builds("relu6_cuda", SOURCES["cuda"])  # --cuda
