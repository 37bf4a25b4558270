"""Rung 7, and the first thing to look at there: each instruction of csrc/cuda/device/ on a GPU that
has all of them, against the same definitions as the CPU model (test_simt_instructions.py)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import instructions
import pytest
import torch
from gpu_places import MARKS


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if torch.cuda.get_device_capability()[0] != 9:
        return "wgmma is Hopper's alone"
    if shutil.which("nvcc") is None:
        return "nvcc is not found"
    return None


pytestmark = [*MARKS, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What `python tests/instructions.py` says to each case: in a process of its own, since after a
    kernel that faults nothing runs on the device any more."""
    done = subprocess.run(
        [sys.executable, instructions.__file__], capture_output=True, text=True, timeout=200
    )
    lines = re.findall(r"^(pass|FAIL) (.*?)(?:: (.*))?$", done.stdout, re.MULTILINE)
    assert lines, done.stdout + done.stderr
    return {name: word if word == "pass" else message for word, name, message in lines}


@pytest.mark.parametrize("case", list(instructions.cases()), ids=lambda case: case.name)
def test_definition(case: instructions.Case, said: dict[str, str]) -> None:
    assert said.get(case.name, "not run: one before it has ended it all") == "pass"
