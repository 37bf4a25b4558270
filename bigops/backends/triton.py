"""The Triton backend: on CUDA tensors, and on CPU tensors under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_not(device: str) -> str | None:
    """None when Triton kernels can run on tensors of `device`, else the reason."""
    if not INSTALLED:
        return "triton is not installed"
    if device == "cpu" and not INTERPRETED:
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the import"
    return None
