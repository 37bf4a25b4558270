"""`pytest bench/`: the cases of `bigops bench` under pytest-benchmark, ours beside eager.

pytest bench/ -k "attention and float32" --benchmark-autosave
pytest bench/ -k "attention and float32" --benchmark-compare
pytest bench/ -k "attention and float32" --benchmark-histogram
"""

from __future__ import annotations

from typing import Any

import pytest

from bigops.bench import run
from bigops.bench.cases import EAGER, OURS, Case

CASES = run.cases(run.quick())


@pytest.mark.parametrize("contestant", [OURS, EAGER])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_speed(benchmark: Any, case: Case, contestant: str) -> None:
    call = case.runner(contestant)
    benchmark.group = case.title
    benchmark.pedantic(call, args=(0,), warmup_rounds=2, rounds=10)
