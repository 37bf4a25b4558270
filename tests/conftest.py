"""What every test gets: a seed, two threads, and fresh memory filled with NaN; and the interpreted
sessions, which run beside the other tests.

A test with the mark `beside(arguments, at_least)`, once for each session, waits for sessions of
`interpreter.py`. They begin with the run, one after the other; the tests that wait for them come
last, and while they wait they run what has not begun, the last ones first. After them, with nothing
beside, come those with the mark `alone`, which measure.
"""

from __future__ import annotations

import gc
import os
import runpy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

# A thread that waits by spinning keeps its core from what runs beside. OpenMP reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from bigops.backends.interpreter_speed import roomy

os.environ["BIGOPS_TUNED"] = "0"  # what was tuned on this machine is not what is tested

INTERPRETER = runpy.run_path(str(Path(__file__).with_name("interpreter.py")))
Session = tuple[Future[str], list[str], int]
NOT_BEGUN: deque[Session] = deque()
OUTPUTS: dict[str, list[Future[str]]] = {}  # of each test's sessions


def run_first() -> None:
    while NOT_BEGUN:
        run(NOT_BEGUN.popleft)


def run(taken: Callable[[], Session]) -> None:
    try:
        output, arguments, at_least = taken()
    except IndexError:  # the other thread has taken the last one
        return
    try:
        output.set_result(INTERPRETER["session"](*arguments, at_least=at_least))
    except Exception as error:  # the test's that waits for it
        output.set_exception(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("alone") else bool(item.get_closest_marker("beside"))

    items.sort(key=place)
    # pytest's own frames lie so deep that a test's can meet the end of a block at every call. There
    # is no hook below them: the method is replaced, which mypy wants to be told of.
    for item in items:
        item.runtest = roomy(item.runtest)  # type: ignore[method-assign]


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # what is imported stays: it need not be looked through again and again
    if session.config.option.collectonly or os.environ.get("TRITON_INTERPRET") == "1":
        return
    seed = session.config.getoption("hypothesis_seed", None)
    more = [] if seed is None else [f"--hypothesis-seed={seed}"]
    for item in session.items:
        for mark in item.iter_markers("beside"):
            output: Future[str] = Future()
            OUTPUTS.setdefault(item.nodeid, []).append(output)
            NOT_BEGUN.append((output, [*mark.args[0], *more], mark.args[1]))
    Thread(target=run_first, daemon=True).start()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
    NOT_BEGUN.clear()
    for process in list(INTERPRETER["RUNNING"]):  # each thread takes its own off
        process.kill()


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> list[str]:
    """What the test's sessions printed; AssertionError where one failed."""
    outputs = OUTPUTS[request.node.nodeid]
    while NOT_BEGUN and not all(output.done() for output in outputs):
        run(NOT_BEGUN.pop)
    return [output.result() for output in outputs]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Without a GPU, torch.manual_seed notes its caller's stack for the day one is found.
    on_gpu = torch.cuda.is_available()
    (torch.manual_seed if on_gpu else torch.default_generator.manual_seed)(0)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: their maximum), so that an unwritten element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
