"""CUDA C++ kernels: `bigops._native_cuda`, the native backend on CUDA tensors.

A kernel is preferred over Triton's for an op and an architecture once a GPU run that proves it is
committed: PROVEN names its results. Until then it serves only where it is forced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

# (op, compute capability) -> what proves it, under bench/results/.
PROVEN: dict[tuple[str, tuple[int, int]], str] = {
    ("attention", (9, 0)): "nvidia-h200/attention-cuda.json",
    ("adam", (9, 0)): "nvidia-h200/adam-cuda.json",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def _constant(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does (its own import takes seconds): Dynamo makes
    the call instead of tracing what asks the driver, and a cached function, of which it warns."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def kernels() -> Any:
    """The extension module. Ask `why_not` first."""
    return importlib.import_module("bigops._native_cuda")


@functools.cache
def _why_not() -> str | None:
    if importlib.util.find_spec("bigops._native_cuda") is None:
        return "the CUDA C++ kernels are not built (BIGOPS_BUILD_CUDA=1 pip install ...)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason: str | None = kernels().why_not()
    return reason


@_constant
def why_not() -> str | None:
    """None when the CUDA C++ kernels can run here, else the reason."""
    return _why_not()


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@_constant
def capability(device: torch.device) -> tuple[int, int]:
    """The architecture of a CUDA device, as (9, 0) for Hopper."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def unproven(op: str, device: torch.device) -> str | None:
    """None when an op's kernel is proven on this architecture, else the reason not to choose it."""
    major, minor = capability(device)
    if (op, (major, minor)) in PROVEN:
        return None
    return f"unproven on sm_{major}{minor}: opt in by use_backend('native')"
