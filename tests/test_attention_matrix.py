"""attention by the error rule, over a matrix of sizes, masks and features: out, lse and every
gradient, on the native kernels here and on Triton's in interpreted processes.

    pytest tests/test_attention_matrix.py            # every pair of values, 300 cases a backend
    pytest -m slow tests/test_attention_matrix.py    # every combination of sizes, masks, dtypes
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch
from covering import every_pair, pairs

import bigops
from bigops import check

MATRIX = runpy.run_path(str(Path(__file__).with_name("attention_matrix.py")))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
OP = bigops.ops.get("attention")
CASES = 300
COVERING = MATRIX["covering"](CASES)
sample, named = MATRIX["sample"], MATRIX["named"]
HALVES = ("first", "second")  # of the cases, each in an interpreted process of its own


def test_every_pair_of_values_is_covered() -> None:
    covered = {pair for case in COVERING for pair in pairs(case)}
    assert covered >= set(every_pair(MATRIX["FACTORS"]))
    assert len(COVERING) >= CASES


def holds(case: object, device: str = "cpu", backend: str = BACKEND) -> None:
    for found in check.check_arbitrary(OP, sample(case), backend, case.dtype, device):  # type: ignore[attr-defined]
        assert found.ok, found


ids = [f"{HALVES[i % 2]}-{i}-{named(case)}" for i, case in enumerate(COVERING)]


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("case", COVERING, ids=ids)
def test_truth(case: object) -> None:
    holds(case)


@pytest.mark.slow
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("case", MATRIX["whole"](), ids=named)
def test_truth_of_the_whole_matrix(case: object) -> None:
    holds(case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("case", COVERING, ids=ids)
def test_truth_on_a_gpu(case: object) -> None:
    holds(case, "cuda", "triton")


@pytest.mark.skipif(INTERPRETED, reason="it starts the process that this one is")
@pytest.mark.beside([__file__, "-k", f"test_truth and {HALVES[0]}"], len(COVERING) // 2)
@pytest.mark.beside([__file__, "-k", f"test_truth and {HALVES[1]}"], len(COVERING) // 2)
def test_interpreted(beside: list[str]) -> None:
    """The same on Triton's interpreter."""
    for output in beside:
        print(output.splitlines()[-1])
