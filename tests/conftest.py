"""What every test gets: a seed, two threads, and fresh memory filled with NaN; and the interpreted
sessions, which run beside the other tests.

A test with the mark `beside(arguments, at_least)`, once for each session, waits for sessions of
`interpreter.py`. They begin with the run, one after the other; the tests that wait for them come
last, and then run themselves what has not begun. After them, with nothing beside, come those with
the mark `alone`, which measure.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# A thread that waits by spinning keeps its core from what runs beside. OpenMP reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

os.environ["BIGOPS_TUNED"] = "0"  # what was tuned on this machine is not what is tested

INTERPRETER = runpy.run_path(str(Path(__file__).with_name("interpreter.py")))
Session = tuple[list[str], int]
BESIDE = ThreadPoolExecutor(1)
BEGUN: dict[str, list[tuple[Future[str], Session]]] = {}


def run(session: Session) -> str:
    arguments, at_least = session
    output: str = INTERPRETER["session"](*arguments, at_least=at_least)
    return output


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("alone") else bool(item.get_closest_marker("beside"))

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or os.environ.get("TRITON_INTERPRET") == "1":
        return
    seed = session.config.getoption("hypothesis_seed", None)
    more = [] if seed is None else [f"--hypothesis-seed={seed}"]
    for item in session.items:
        for mark in item.iter_markers("beside"):
            asked = [*mark.args[0], *more], mark.args[1]
            BEGUN.setdefault(item.nodeid, []).append((BESIDE.submit(run, asked), asked))


def pytest_sessionfinish() -> None:
    BESIDE.shutdown(wait=False, cancel_futures=True)
    for process in INTERPRETER["RUNNING"]:
        process.kill()


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> list[str]:
    """What the test's sessions printed; AssertionError where one failed."""
    # The last ones first: they may not have begun, and run here while an earlier one still does.
    outputs = [
        run(asked) if future.cancel() else future.result()
        for future, asked in reversed(BEGUN[request.node.nodeid])
    ]
    return outputs[::-1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: their maximum), so that an unwritten element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
