"""relu6 in C++: built by ninja at the first call, and again when a file in csrc/ has changed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from bigops import extension
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CSRC = Path(__file__).parent / "csrc"
SOURCES = {
    "cpu": [CSRC / "bind.cpp", CSRC / "relu6.cpp"],  # --cpp
    "cuda": [CSRC / "bind.cpp", CSRC / "relu6.cu"],  # --cuda
}
REASONS = {device: extension.why_not(device) for device in SOURCES}


def why_not(x: Tensor) -> str | None:
    """None when these kernels serve the call, else the reason."""
    return REASONS[x.device.type] if x.dtype in DTYPES else f"dtype {x.dtype}"


@functools.cache
def kernels(device: str) -> Any:
    """The module of C++ functions for tensors of `device`."""
    return extension.load(f"relu6_{device}", SOURCES[device])


def forward(x: Tensor) -> Tensor:
    """out, like x."""
    out = torch.empty_like(x)
    kernels(x.device.type).forward(_like(out, x), out)
    return out


def backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """grad_x, like x."""
    grad_x = torch.empty_like(x)
    kernels(x.device.type).backward(_like(grad_x, grad_out), _like(grad_x, x), grad_x)
    return grad_x


def _like(result: Tensor, x: Tensor) -> Tensor:
    """x, lying in memory as the dense `result` does; a copy only if it does not."""
    return x if x.stride() == result.stride() else torch.empty_like(result).copy_(x)
