"""Triton kernels on the CPU: `python tests/interpreter.py [pytest's arguments]`.

Triton decides when a kernel is decorated whether it will be interpreted, so interpreted tests need
a process of their own. This file is that process (run as a script) and the way to start it from
another one (`session`). A test may ask whether it runs there: `os.environ.get("TRITON_INTERPRET")`.

The interpreter is corrected there (`bigops/backends/interpreter.py`), unless the environment holds
BIGOPS_INTERPRETER_UNCORRECTED=1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNCORRECTED = "BIGOPS_INTERPRETER_UNCORRECTED"
RUNNING: list[subprocess.Popen[str]] = []


def session(*arguments: str, at_least: int = 1, timeout: float = 3600.0) -> str:
    """Runs pytest interpreted in a process of its own; its output.

    AssertionError, with the end of the output, when a test fails or fewer than at_least pass.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    # Other processes share the cores: a thread that waits by spinning keeps theirs from them.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        RUNNING.append(process)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
            RUNNING.remove(process)
    passed = sum(int(count) for count in re.findall(r"(\d+) passed", output))
    assert process.returncode == 0, f"the interpreted tests failed:\n{output[-6000:]}"
    assert passed >= at_least, f"{passed} interpreted tests ran, not {at_least}:\n{output[-2000:]}"
    return output


def main(arguments: list[str]) -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[0] = str(ROOT)
    if os.environ.get(UNCORRECTED) != "1":
        from bigops.backends import interpreter

        interpreter.apply()
    import pytest

    return pytest.main(["--import-mode=importlib", "-p", "no:cacheprovider", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
