"""Which backend serves a call: the road from a function to a kernel, and how to see or force it.

A function asks `is_fast(op, args)`; the torch op behind it asks `backend_for(op, args)`. Both look
at metadata only (shapes, dtypes, devices), never at values, so that nothing synchronises and
torch.compile can trace through.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import tuned

if TYPE_CHECKING:
    from .declare import Backend, Op

BACKENDS = ("native", "triton", "reference")


class FallbackWarning(UserWarning):
    """A call was served by the reference because no fast backend takes it."""


class BackendError(RuntimeError):
    """The backend that was forced does not serve this call, or strict mode met a fallback."""


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", *BACKENDS):
        return name or None
    raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")


# A plain global: Dynamo guards on it, while it rejects ContextVar.get.
_forced: str | None = _checked(os.environ.get("BIGOPS_BACKEND"), "BIGOPS_BACKEND")
_strict: bool = os.environ.get("BIGOPS_STRICT", "0") not in ("", "0")
_warned: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
_explaining: int | None = None  # the thread whose next call is only to be explained
_one_explains = threading.RLock()


def forced() -> str | None:
    """The backend that is forced now."""
    return _forced


def explaining() -> bool:
    """Whether `explain` waits for the decision of this thread's next call."""
    return _explaining is not None and _explaining == threading.get_ident()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for every bigops call inside the block, in all threads.

    Args:
        name: "native", "triton", "reference", or None for the usual choice. A call that the
            forced backend does not serve raises `BackendError` with the reason.

    Raises:
        ValueError: unknown name.

    Example:
        >>> with bigops.use_backend("reference"):
        ...     out = bigops.attention(query, key, value)
    """
    global _forced
    previous = _forced
    _forced = _checked(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def _reason(backend: Backend, device: str, args: tuple[Any, ...], forced: str | None) -> str | None:
    if device not in backend.devices:
        return f"no kernels for device {device}"
    if forced != backend.name and not backend.automatic(device):
        return f"serves {device} tensors only when forced by use_backend({backend.name!r})"
    return backend.why_not(*args)


def passed_over(op: Op, args: tuple[Any, ...], beyond: str | None = None) -> list[tuple[str, str]]:
    """(backend, reason) of every fast backend that does not serve the call."""
    device = op.device_of(args)
    reasons = [(b.name, beyond or _reason(b, device, args, _forced)) for b in op.backends]
    return [(name, reason) for name, reason in reasons if reason is not None]


def find(op: Op, args: tuple[Any, ...], forced: str | None) -> Backend | None:
    """The fast backend that serves the call when `forced` is the forced one."""
    return _first(op, args, forced, tuned.choice(op.name, args) if forced is None else None)


def _first(
    op: Op, args: tuple[Any, ...], forced: str | None, choice: tuned.Choice | None
) -> Backend | None:
    device, backends = op.device_of(args), op.backends
    if choice is not None:
        backends = tuple(sorted(backends, key=lambda backend: backend.name != choice.backend))
    for backend in backends:
        wanted = forced is None or backend.name == forced
        if wanted and _reason(backend, device, args, forced) is None:
            return backend
    return None


def is_fast(op: Op, args: tuple[Any, ...], beyond: str | None = None) -> bool:
    """Whether a fast backend serves the call; warns (or raises) where the reference has to.

    `args` are the torch op's arguments; `beyond` is the reason when the call asks for something
    that these cannot even express.
    """
    # Not asked by a call that is compiled: what changes later must not become its guard.
    compiling = torch.compiler.is_compiling()
    if not compiling and explaining():
        raise _Explained(op, args, beyond)
    choice = None
    if not compiling and beyond is None and _forced is None:
        choice = tuned.choice(op.name, args)
    if "reference" in (_forced, choice and choice.backend):
        return False
    if beyond is None and _first(op, args, _forced, choice) is not None:
        return True
    if _forced is not None or _strict:
        why = f"backend {_forced} is forced" if _forced else "BIGOPS_STRICT=1"
        raise BackendError(_message(op, args, beyond, why))
    if not compiling:
        _warn(op, args, beyond)
    return False


def backend_for(op: Op, args: tuple[Any, ...]) -> Backend:
    """The backend that runs the torch op itself."""
    # A backward may run after the block that forced "reference" or another backend.
    backend = find(op, args, None if _forced == "reference" else _forced)
    if backend is None:
        raise BackendError(_message(op, args, None, "and a torch op has no reference to run"))
    return backend


def _message(op: Op, args: tuple[Any, ...], beyond: str | None, why: str) -> str:
    listed = "; ".join(f"{name}: {reason}" for name, reason in passed_over(op, args, beyond))
    return f"bigops.{op.name}: no fast backend serves this call ({why}): {listed}"


def _warn(op: Op, args: tuple[Any, ...], beyond: str | None) -> None:
    reasons = passed_over(op, args, beyond)
    key = (op.name, tuple(reasons))
    if key in _warned:
        return
    _warned.add(key)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    size = op.reference_bytes(*args) if op.reference_bytes else 0
    memory = f", which allocates about {size / 2**20:.1f} MiB" if size else ""
    warnings.warn(
        f"bigops.{op.name} runs the reference{memory}: {listed}", FallbackWarning, stacklevel=4
    )


class _Explained(Exception):
    """Carries a call's decision out of the function that was about to make it."""

    def __init__(self, op: Op, args: tuple[Any, ...], beyond: str | None) -> None:
        super().__init__()
        self.op = op
        self.op_args = args
        self.beyond = beyond


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend, the ATen ops it calls, and why others were passed over."""

    op: str
    backend: str
    aten: dict[str, str]
    passed_over: list[tuple[str, str]]
    tuned: str | None = None  # why `bigops bench --tune` chose it

    def __str__(self) -> str:
        lines = [f"bigops.{self.op}: {self.backend}"]
        if self.tuned:
            lines.append(f"  tuned: {self.tuned}")
        lines += [f"  calls {name}: {reason}" for name, reason in self.aten.items()]
        lines += [f"  not {name}: {reason}" for name, reason in self.passed_over]
        return "\n".join(lines)


def decision(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Op, tuple[Any, ...], str | None]:
    """What a call decides by, without running it: the arguments of `is_fast`.

    Raises:
        TypeError: `function` is not one of bigops' functions.
    """
    global _explaining
    with _one_explains:
        _explaining = threading.get_ident()
        try:
            function(*args, **kwargs)
        except _Explained as found:
            return found.op, found.op_args, found.beyond
        finally:
            _explaining = None
    raise TypeError(f"function must be a function of bigops, got {function!r}")


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would take, without running it.

    Args:
        function: a bigops function, such as `bigops.attention`.
        *args, **kwargs: the call's arguments.

    Raises:
        TypeError: `function` is not one of bigops' functions.

    Example:
        >>> print(bigops.explain(bigops.attention, query, key, value, causal=True))
    """
    op, op_args, beyond = decision(function, *args, **kwargs)
    choice = tuned.choice(op.name, op_args) if beyond is None and _forced is None else None
    reference = beyond is not None or "reference" in (_forced, choice and choice.backend)
    backend = None if reference else _first(op, op_args, _forced, choice)
    name = backend.name if backend else "reference"
    passed = passed_over(op, op_args, beyond)
    followed = choice is not None and choice.backend == name
    if followed:
        told = {name, *dict(passed)}
        slower = "slower for this call when tuned"
        passed += [(other.name, slower) for other in op.backends if other.name not in told]
    return Explanation(
        op=op.name,
        backend=name,
        aten=dict(backend.aten) if backend else {},
        passed_over=passed,
        tuned=choice.why if choice and followed else None,
    )
