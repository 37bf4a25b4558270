"""Rung 2 of the ladder, under AddressSanitizer and UndefinedBehaviorSanitizer.

`pytest -m sanitizer` is this file; the default run has it too. The module of the least instruction
set (`-m slow`: this machine's best) is built once more, kernels and bindings, with the sanitizers
and with warnings as errors; then the ops' own tests run on it in processes of their own. Tensors
are watched too, as torch takes its CPU memory from malloc.

What stays unseen: AVX-512's masked loads and stores and AMX's tile loads and stores, which the
compiler does not instrument; what goes wrong within a tensor's memory; and races, as
ThreadSanitizer does not know libgomp's barriers and calls correct loops racy.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bigops.backends import native

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
EXTRA = "-fsanitize=address,undefined -fno-sanitize-recover=all -Werror -O2 -g1"
# Two processes, about as long as each other, and how many tests pass in each at least.
PARTS = {
    ("test_ops.py", "test_attention.py", "test_attention_split.py"): 450,
    (
        "sanitized.py",
        "test_conv2d_act.py",
        "test_conv2d_relu_max_pool2d.py",
        "test_conv2d_winograd.py",
        "test_adam.py",
        "test_optim.py",
        "test_route.py",
    ): 350,
}
DESELECTED = {  # what begins like this, and why
    "test_ops.py::test_interpreted": "Triton's, in a process of its own",
    "test_adam.py::test_interpreted": "Triton's, in a process of its own",
    "test_attention.py::test_memory_is_linear": "the memory of a process with another module",
    "test_attention.py::test_one_head_runs_on_all_threads": "a process with another module",
    **{
        f"{file}::test_any_shape[{digit}": "a third of the shapes is left: each takes seconds"
        for file in ("test_conv2d_act.py", "test_conv2d_relu_max_pool2d.py")
        for digit in (1, 2)
    },
}


def libraries() -> str | None:
    """What has to be in the process before any allocation: libasan, and libstdc++ for it to find
    the functions of exceptions in."""
    if shutil.which(COMPILER.split()[0]) is None:
        return None
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [*COMPILER.split(), f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found.append(done.stdout.strip())
    # A bare name says that there is none.
    return ":".join(found) if all(map(os.path.isabs, found)) else None


def why_not() -> str | None:
    if native.ISA is None:
        return native.REASON
    if libraries() is None:
        return f"{COMPILER} or its libasan is not installed"
    for module in ("ninja", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"the build needs {module}: pip install -e '.[test]'"
    return None


REASON = why_not()
# The install works without a compiler, and then there is nothing to build here either.
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


LEAST = next(iter(native.SUPPORTED), None)
BEST = pytest.param(
    native.ISA,
    marks=[
        pytest.mark.slow,
        # The test of LEAST is the same one then.
        pytest.mark.skipif(native.ISA == LEAST, reason="this machine has one instruction set"),
    ],
)


def sanitized(*arguments: str, isa: str | None = LEAST) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizer's library; the interpreter itself leaks on purpose."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Two processes share the cores: threads that wait by spinning keep the other's from them,
        # and all of it takes five times as long.
        "OMP_WAIT_POLICY": "passive",
        "BIGOPS_CPU_ISA": str(isa),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def build(isa: str, folder: Path) -> Path:
    """The sanitized module, built away from the normal build's objects."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    # pybind11's templates take as long as all kernels otherwise: all bindings are one source here,
    # and so no two of them may define one name.
    bindings = folder / "bindings.cpp"
    bindings.write_text("".join(f'#include "{source}"\n' for source in setup["BINDINGS"]))
    rules = setup["ninja_file"](COMPILER, [isa], EXTRA, "-O1 -g0", bindings=[bindings])
    (folder / "build.ninja").write_text(rules)
    built = folder / setup["module_file"](f"_native_{isa}")
    command = [sys.executable, "-m", "ninja", "-C", str(folder), built.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return built


@pytest.mark.parametrize("isa", [pytest.param(LEAST, marks=pytest.mark.sanitizer), BEST])
def test_ops_run_clean(isa: str, tmp_path: Path) -> None:
    module = build(isa, tmp_path)
    program = str(ROOT / "tests" / "sanitized.py")
    deselected = [f"--deselect=tests/{test}" for test in DESELECTED]

    def run(files: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        paths = [f"tests/{name}" for name in files]
        return sanitized(program, str(module), *deselected, *paths, isa=isa)

    with ThreadPoolExecutor(len(PARTS)) as pool:
        for done, at_least in zip(pool.map(run, PARTS), PARTS.values(), strict=True):
            output = done.stdout + done.stderr
            assert done.returncode == 0, output[-6000:]
            (passed,) = re.findall(r"(\d+) passed", output)
            assert int(passed) >= at_least, output[-2000:]


@pytest.mark.sanitizer
def test_memory_of_tensors_is_watched() -> None:
    """One byte past a tensor's end is found: torch's allocator goes through the sanitizer's."""
    code = (
        "import ctypes, torch; t = torch.empty(5)\n"
        "ctypes.memset(t.data_ptr() + t.nbytes - 1, 0, {})\n"
        "print('alive')"
    )
    assert sanitized("-c", code.format(1)).stdout.strip() == "alive"
    done = sanitized("-c", code.format(2))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
