"""NVTX ranges around every op, so that Nsight Systems and Nsight Compute show it by its name.

    BIGOPS_NVTX=1 python train.py       # or bigops.nvtx(True)

Backends are wrapped when ranges are turned on, or an op is declared later: a call costs nothing
while they are off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .declare import Backend, Op

_ops: list[Op] = []
_plain: dict[str, tuple[Backend, ...]] = {}  # what was wrapped, by op
_on = False


def nvtx(on: bool) -> None:
    """From now on every forward, backward and optimizer step is an NVTX range, or no longer.

    A range is called like "bigops::attention forward [native]". The reference, which is plain
    torch, has none.

    Raises:
        RuntimeError: this build of torch has no NVTX.

    Example:
        >>> bigops.nvtx(True)
        >>> with torch.cuda.profiler.profile():
        ...     loss(model(input)).backward()
    """
    global _on
    if on:
        _require_nvtx()
    _on = on
    for op in _ops:
        _apply(op)


def declared(op: Op) -> None:
    """Include an op that is new."""
    _ops.append(op)
    _apply(op)


def _require_nvtx() -> None:
    try:
        torch.cuda.nvtx.range_push("bigops")
        torch.cuda.nvtx.range_pop()
    except RuntimeError as error:
        raise RuntimeError(f"BIGOPS_NVTX, bigops.nvtx: this torch has no NVTX: {error}") from error


def _apply(op: Op) -> None:
    if _on == (op.name in _plain):
        return
    if _on:
        _plain[op.name] = op.backends
        op.backends = tuple(_ranged(op, backend) for backend in op.backends)
    else:
        op.backends = _plain.pop(op.name)
    op.forget()


def _ranged(op: Op, backend: Backend) -> Backend:
    def wrapped(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        label = f"bigops::{op.name} {what} [{backend.name}]"

        def run(*args: Any) -> Any:
            torch.cuda.nvtx.range_push(label)
            try:
                return function(*args)
            finally:
                torch.cuda.nvtx.range_pop()

        return run

    forward = wrapped(backend.forward, "step" if op.is_step else "forward")
    backward = backend.backward and wrapped(backend.backward, "backward")
    return replace(backend, forward=forward, backward=backward)


if os.environ.get("BIGOPS_NVTX", "0") not in ("", "0"):
    nvtx(True)
