"""Rung 2 of the ladder, under AddressSanitizer and UndefinedBehaviorSanitizer.

The module of the least instruction set (`-m slow`: also this machine's best) is built once more,
with the sanitizers and with warnings as errors, and runs the op table's samples in a process of its
own. Tensors are watched too, as torch takes its CPU memory from malloc. What the compiler does not
instrument stays unseen: AVX-512's masked loads and stores, and AMX's tile loads and stores.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigops.backends import native

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
EXTRA = "-fsanitize=address,undefined -fno-sanitize-recover=all -Werror -O1 -g1"
# Only the kernels are sanitized: pybind11's templates would take longer than all of them.
BINDING_EXTRA = "-O0 -g0 -fno-sanitize=all"
AT_LEAST = 200


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
        "BIGOPS_CPU_ISA": str(isa),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def build(isa: str, folder: Path) -> Path:
    """The sanitized module, built away from the normal build's objects."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    rules = setup["ninja_file"](COMPILER, [isa], EXTRA, BINDING_EXTRA)
    (folder / "build.ninja").write_text(rules)
    built = folder / setup["module_file"](f"_native_{isa}")
    command = [sys.executable, "-m", "ninja", "-C", str(folder), built.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return built


@pytest.mark.parametrize("isa", [LEAST, BEST])
def test_samples_run_clean(isa: str, tmp_path: Path) -> None:
    module = build(isa, tmp_path)
    done = sanitized(str(ROOT / "tests" / "sanitized.py"), str(module), isa=isa)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert int(done.stdout.split()[-1]) >= AT_LEAST


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
