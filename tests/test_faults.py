"""Every fault in tests/faults is caught by the test that it names.

The default run plants one of each kind, in flagships and in C++ and Triton by turns; `-m slow` the
others.

A fault is planted in a copy of what the package is made of, the working tree is only read. The
copies for the C++ kernels start from objects that are compiled once, with little optimisation and
for the least instruction set, so that a fault costs the compilation of one file.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from faults import FAULTS, KINDS, Fault

from bigops.backends import native, triton

ROOT = Path(__file__).resolve().parents[1]
FLAGSHIPS = ("attention", "conv2d", "adam")
RELATED = {
    "batch_norm_act": "conv2d",
    "max_pool2d": "conv2d",
    "sgd": "adam",
}  # ops that are counted with a flagship
BACKENDS = ("native", "triton")
COMPILER = os.environ.get("CXX", "g++")
LEAST = next(iter(native.SUPPORTED), None)
PASSED = "passed"
# Says in pytest's header which package the tests are of.
CONFTEST = """
import bigops
from bigops.backends import native


def pytest_report_header() -> list[str]:
    module = getattr(native.kernels, "__file__", None)
    return [f"package: {bigops.__file__}", f"module: {module}"]
"""


def why_not_compiled() -> str | None:
    if LEAST is None:
        return native.REASON
    if shutil.which(COMPILER.split()[0]) is None:
        return f"{COMPILER} is not installed"
    for module in ("ninja", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"the build needs {module}: pip install -e '.[test]'"
    return None


REASONS = {
    "native": why_not_compiled(),
    "triton": None if triton.INSTALLED else "triton is not installed",
}


def copy_package(tree: Path) -> None:
    """What the tests of a fault need, laid out as here; kernels/ is a package of bigops."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("bigops", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, tree / name)
    (tree / "bigops" / "kernels").symlink_to(Path("..", "kernels"))
    (tree / "conftest.py").write_text(CONFTEST)


def build(tree: Path) -> None:
    """Compile what is newer than its object; paths are relative, so that copies keep theirs."""
    setup = runpy.run_path(str(tree / "setup.py"))
    folder = tree / "build"
    folder.mkdir(exist_ok=True)
    bindings = folder / "bindings.cpp"  # one source, as most of each is pybind11's headers
    if not bindings.exists():
        includes = (f'#include "../csrc/bind/{source.name}"\n' for source in setup["BINDINGS"])
        bindings.write_text("".join(includes))
    rules = setup["ninja_file"](COMPILER, [LEAST], "-O1 -g0", bindings=[bindings])
    (folder / "build.ninja").write_text(rules.replace(f"{tree}/", "../"))
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for module in folder.glob("*.so"):
        shutil.copy2(module, tree / "bigops")


def outcomes(tree: Path, tests: list[str], interpreted: bool) -> dict[str, str]:
    """What became of each test of the copy: `PASSED`, or the failure's message."""
    report = tree / f"report-{interpreted}.xml"  # both may run in one tree
    start = [str(tree / "tests" / "interpreter.py")] if interpreted else ["-m", "pytest"]
    nodes = [f"tests/{test}" for test in tests]
    removed = ("BIGOPS_BACKEND", "BIGOPS_STRICT", "TRITON_INTERPRET", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in removed}
    environment |= {"BIGOPS_CPU_ISA": LEAST} if LEAST else {}
    # Two at a time: a thread that waits by spinning keeps the other's from the cores.
    environment |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, *start, "-p", "no:cacheprovider", f"--junitxml={report}", *nodes],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert done.returncode in (0, 1), output[-6000:]
    assert f"package: {tree}/bigops/__init__.py" in output
    if LEAST is not None and (tree / "build").exists():
        assert f"module: {tree}/bigops/_native_{LEAST}" in output
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        path = case.get("classname", "").replace(".", "/").removeprefix("tests/")
        failure = case.find("failure")
        other = next((e.tag for e in case if e.tag in ("error", "skipped")), PASSED)
        message = other if failure is None else failure.get("message", "")
        found[f"{path}.py::{case.get('name')}"] = message
    assert list(found) == tests, output[-6000:]
    return found


def is_interpreted(fault: Fault) -> bool:
    return fault.backend == "triton" and not fault.test.startswith("test_ieee.py")


def verdict(fault: Fault, base: Path, tree: Path) -> str:
    """What the fault's test says to it."""
    shutil.copytree(base, tree, symlinks=True)
    try:
        path = tree / fault.file
        text = path.read_text()
        assert text.count(fault.old) == 1, f"tests/faults: not once in {fault.file}: {fault.old}"
        path.write_text(text.replace(fault.old, fault.new))
        if fault.backend == "native":
            build(tree)
        return outcomes(tree, [fault.test], is_interpreted(fault))[fault.test]
    finally:
        shutil.rmtree(tree)


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Fault | bool, Future]]:
    """Of every fault that was asked for; and, by whether they are interpreted, of the same tests
    where nothing is planted. Two at a time."""
    asked = [
        item.callspec.params["fault"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_fault_is_caught
    ]
    asked = [fault for fault in asked if REASONS[fault.backend] is None]
    folder = tmp_path_factory.mktemp("faults").resolve()
    base = folder / "base"
    copy_package(base)
    if REASONS["native"] is None:
        build(base)
    found: dict[Fault | bool, Future] = {}
    with ThreadPoolExecutor(2) as pool:
        for interpreted in (True, False):
            tests = [fault.test for fault in asked if is_interpreted(fault) == interpreted]
            tests = list(dict.fromkeys(tests))
            found[interpreted] = pool.submit(outcomes, base, tests, interpreted)
        for i, fault in enumerate(asked):
            found[fault] = pool.submit(verdict, fault, base, folder / str(i))
        yield found
        pool.shutdown(cancel_futures=True)


def flagship(fault: Fault) -> str:
    op = RELATED.get(fault.op, fault.op)
    return next(name for name in FLAGSHIPS if op.startswith(name))


def parameters() -> Iterator[Any]:
    planted = set()
    for fault in FAULTS:
        turn = KINDS.index(fault.kind)
        its = FLAGSHIPS[turn % len(FLAGSHIPS)], BACKENDS[turn % len(BACKENDS)]
        default = (flagship(fault), fault.backend) == its and fault.kind not in planted
        planted |= {fault.kind} if default else set()
        marks = [] if default else [pytest.mark.slow]
        yield pytest.param(fault, marks=marks, id=f"{fault.op}-{fault.backend}-{fault.kind}")


@pytest.mark.parametrize("fault", list(parameters()))
def test_fault_is_caught(fault: Fault, verdicts: dict[Fault | bool, Future]) -> None:
    if (reason := REASONS[fault.backend]) is not None:
        pytest.skip(reason)
    said = verdicts[fault].result()
    # pytest leaves the exception's name out where its message is the assertion.
    assert said.startswith(("AssertionError", "assert ")), said


@pytest.mark.parametrize("interpreted", [False, True])
def test_nothing_is_caught_where_nothing_is_planted(
    interpreted: bool, verdicts: dict[Fault | bool, Future]
) -> None:
    said = verdicts[interpreted].result()
    assert said
    assert set(said.values()) == {PASSED}, said


def test_the_list_is_complete() -> None:
    """Every kind of fault for every flagship on both backends."""
    planted = {(flagship(f), f.backend, f.kind) for f in FAULTS}
    assert planted == set(product(FLAGSHIPS, BACKENDS, KINDS))


def test_every_text_is_where_the_list_says() -> None:
    """Also of the faults that only `-m slow` plants."""
    lost = [f for f in FAULTS if (ROOT / f.file).read_text().count(f.old) != 1]
    assert not lost
