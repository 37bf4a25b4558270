"""The Triton backend: on CUDA tensors, and on CPU tensors under Triton's interpreter.

Where launches only compile, as in the compile ledger, CPU tensors stand for a GPU's.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_compiling = False


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, CPU tensors are served: the caller sees to it that launches only compile."""
    global _compiling
    before, _compiling = _compiling, True
    try:
        yield
    finally:
        _compiling = before


def is_compiling() -> bool:
    """Whether launches only compile now."""
    return _compiling


def why_not(device: str) -> str | None:
    """None when Triton kernels can run on tensors of `device`, else the reason."""
    if not INSTALLED:
        return "triton is not installed"
    if device == "cpu" and not INTERPRETED and not _compiling:
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the import"
    return None
