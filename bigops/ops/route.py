"""The short road of a call: what a function has decided once holds for every call alike.

Checks and the choice of a backend read metadata only, so two calls that agree in it take the same
way. A function asks for the route before it checks anything, and leaves one once it has decided:

    if (route := find(OP, tensors, options)) is not None:
        return route(*tensors)
    ...
    if is_fast(OP, call):
        leave(OP, tensors, options, call)

Without it a call costs more than a small op itself. It needs the native module, whatever backend
serves the call: read in Python, the metadata takes as long as the checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..backends import native
from . import dispatch
from .registration import PLAIN, casting, watched

if TYPE_CHECKING:
    from .declare import Op

MOST = 1024  # routes of an op; shapes that never return must not fill the memory


class Route:
    """A backend's forward (with its node, if a gradient is needed) and what follows the tensors."""

    __slots__ = ("_forward", "_rest")

    def __init__(self, forward: Callable[..., Any], rest: tuple[Any, ...]) -> None:
        self._forward, self._rest = forward, rest

    def __call__(self, *tensors: torch.Tensor | None) -> Any:
        return self._forward(*tensors, *self._rest)


def _key(
    tensors: tuple[torch.Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[bytes, tuple[Any, ...], str | None, bool] | None:
    """What the decision may depend on; None where it has to be made anew."""
    if native.kernels is None or watched() or dispatch.explaining() or casting():
        return None
    found = native.kernels.signature(tensors, options, PLAIN)
    if found is None:
        return None
    return found, options, dispatch.forced(), torch.is_grad_enabled()


def find(
    op: Op, tensors: tuple[torch.Tensor | None, ...], options: tuple[Any, ...]
) -> Route | None:
    """The route of calls alike, if one was left."""
    key = _key(tensors, options)
    try:
        return None if key is None else op.routes.get(key)
    except TypeError:  # a list among the options
        return None


def leave(
    op: Op,
    tensors: tuple[torch.Tensor | None, ...],
    options: tuple[Any, ...],
    call: tuple[Any, ...],
) -> None:
    """Remember that `tensors` and `options` became the torch op's arguments `call`.

    Nothing is remembered of a call whose tensors had to be changed first.
    """
    if any(a is not b for a, b in zip(call, tensors, strict=False)):
        return
    key = _key(tensors, options)
    if key is None:
        return
    # The key's forced backend, not the one that another thread may have forced since.
    backend = dispatch.find(op, call, key[2])
    if backend is None:
        return
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    forward = op.recorded(backend) if recorded else backend.forward
    if len(op.routes) >= MOST:
        op.routes.clear()
    try:
        op.routes[key] = Route(forward, call[len(tensors) :])
    except TypeError:  # a list among the options
        return
