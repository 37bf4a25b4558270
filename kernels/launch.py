"""Launches that repeat: what a call's metadata decides is worked out once.

A launcher computes sizes, tiles and strides, and Triton looks at every argument of every launch:
together longer than a small kernel runs. Both follow from the metadata of the call's tensors; all
that differs between calls alike are addresses. So the first call runs as it is written and is taken
down: which memory it made, what it launched, and where in whose memory each pointer pointed. Calls
alike make the same memory and launch the compiled kernels with their own addresses.

A launcher that is `replayed` launches by `launch`, says of the memory that it makes that it has
`made` it, and calls nothing else that writes. A pointer into any other memory, or one that is not
a multiple of 16 bytes (by which Triton compiles), and the call runs as it is written.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from . import hardware

F = TypeVar("F", bound=Callable[..., Any])
Grid = tuple[int, ...]
ALIGNED = 16  # bytes: what Triton compiles differently by
MOST = 1024  # kinds of calls; those that never return must not fill the memory
_compiled: dict[Any, Any] = {}
_now = threading.local()  # the call that this thread takes down


def launch(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`; tensors are pointers, the first argument is one.

    What Triton compiled is found again by the arguments as far as it looks at them: the dtype and
    the alignment of a pointer, the value of an integer, and of a float nothing.
    """
    key = kernel, args[0].device, *map(_seen, args), *meta.items()
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _with_scratch(kernel[grid], *args, **meta)
        if compiled is not None:
            if len(_compiled) >= MOST:
                _compiled.clear()
            _compiled[key] = compiled
    else:
        _runner(compiled, grid)(*map(_address, _in_order(kernel, args, meta)))
    taken = getattr(_now, "taken", None)
    if taken is not None:
        # None where kernels are interpreted, or only looked at by the compile ledger.
        taken.launches.append(
            None if compiled is None else (compiled, grid, _in_order(kernel, args, meta))
        )


def _runner(compiled: Any, grid: Grid) -> Callable[..., None]:
    run = compiled[(*grid, 1, 1)[:3]]
    # Triton 3.6 does not say for AMD's GPUs, where it needs none.
    needed = getattr(compiled.metadata, "global_scratch_size", 0)
    return functools.partial(_with_scratch, run) if needed else run


def _with_scratch(run: Callable[..., Any], *args: Any, **meta: Any) -> Any:
    """`run(...)`, with torch's memory for what Triton keeps of a kernel besides, as descriptors of
    tensors. In a context of its own: an allocator that the user has set stays."""
    context = contextvars.copy_context()
    context.run(triton.set_allocator, _scratch)
    return context.run(run, *args, **meta)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _seen(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % ALIGNED == 0
    return float if arg.__class__ is float else arg


def _address(arg: Any) -> Any:
    return arg.data_ptr() if isinstance(arg, Tensor) else arg


def _in_order(kernel: Any, args: Sequence[Any], meta: dict[str, Any]) -> list[Any]:
    """All arguments as a compiled kernel takes them: by place, constants too."""
    return [*args, *(meta[name] for name in kernel.arg_names[len(args) :])]


def made(tensor: Tensor) -> Tensor:
    """The tensor, whose memory is new and holds nothing yet."""
    taken = getattr(_now, "taken", None)
    if taken is not None:
        taken.made.append(tensor)
    return tensor


def replayed(launcher: F) -> F:
    """A launcher whose calls are taken down and repeated. Its first argument is a tensor."""
    plans: dict[Any, Plan | None] = {}

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        if getattr(_now, "taken", None) is not None:  # as a part of another one's call
            return launcher(*args)
        key = tuple(map(_word, args)), hardware.state(args[0])
        if key in plans:
            plan = plans[key]
            addresses = None if plan is None else plan.addresses(args)
            return launcher(*args) if addresses is None else plan.run(args[0].device, addresses)
        given = [arg for arg in args if isinstance(arg, Tensor)]
        if len(set(map(id, given))) < len(given):
            return launcher(*args)  # whose memory a pointer is in cannot be told
        _now.taken = taken = _Taken(args)
        try:
            results = launcher(*args)
        finally:
            _now.taken = None
        if len(plans) >= MOST:
            plans.clear()
        plans[key] = taken.plan(results)
        return results

    return call  # type: ignore[return-value]


def _word(arg: Any) -> Any:
    """What calls alike agree in."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.stride(), arg.dtype
    return tuple(arg) if isinstance(arg, list) else arg


class Launch(NamedTuple):
    """A compiled kernel on its grid, its arguments, and which of them are addresses: whose memory
    each is in and how far on."""

    run: Callable[..., None]
    args: list[Any]
    pointers: list[tuple[int, int, int]]


class Plan:
    """What calls alike do. Memory is counted through the tensors given, then those made."""

    def __init__(
        self, given: list[int], made: list[Any], launches: list[Launch], results: Any
    ) -> None:
        self._given, self._made, self._launches, self._results = given, made, launches, results

    def addresses(self, args: Sequence[Any]) -> list[int] | None:
        """Of the tensors given; None where the kernels were not compiled for them."""
        found = [args[i].data_ptr() for i in self._given]
        for address in found:
            if address % ALIGNED:
                return None
        return found

    def run(self, device: torch.device, addresses: list[int]) -> Any:
        """The launcher's results."""
        new = [torch.empty_strided(*form, dtype=d, device=device) for *form, d in self._made]
        addresses += [t.data_ptr() for t in new]
        with hardware.guard(device):
            for run, args, pointers in self._launches:
                args = args.copy()
                for argument, memory, offset in pointers:
                    args[argument] = addresses[memory] + offset
                run(*args)
        if self._results.__class__ is tuple:
            return tuple([None if i is None else new[i] for i in self._results])
        return new[self._results]


class _Taken:
    """A call while it is taken down."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.args = args
        self.made: list[Tensor] = []
        self.launches: list[tuple[Any, Grid, list[Any]] | None] = []

    def plan(self, results: Any) -> Plan | None:
        """None if calls alike cannot do the same."""
        given = [i for i, arg in enumerate(self.args) if isinstance(arg, Tensor)]
        memory = [*(self.args[i] for i in given), *self.made]
        which = {id(tensor): i for i, tensor in enumerate(self.made)}
        several = isinstance(results, tuple)
        wanted = [t for t in (results if several else (results,)) if t is not None]
        if any(id(t) not in which for t in wanted) or any(t.data_ptr() % ALIGNED for t in memory):
            return None
        launches = []
        for found in self.launches:
            launch = None if found is None else _repeatable(*found, memory)
            if launch is None:
                return None
            launches.append(launch)
        made = [(t.shape, t.stride(), t.dtype) for t in self.made]
        if several:
            places = tuple(None if t is None else which[id(t)] for t in results)
            return Plan(given, made, launches, places)
        return Plan(given, made, launches, which[id(results)])


def _repeatable(
    compiled: Any, grid: Grid, args: list[Any], memory: Sequence[Tensor]
) -> Launch | None:
    pointers = []
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            place = _place(arg, memory)
            if place is None:
                return None
            pointers.append((i, *place))
            args[i] = 0
    return Launch(_runner(compiled, grid), args, pointers)


def _place(tensor: Tensor, memory: Sequence[Tensor]) -> tuple[int, int] | None:
    """In whose memory the tensor starts and how many bytes on; None if that is not certain."""
    for i, whole in enumerate(memory):
        if tensor is whole:
            return i, 0
    storage = tensor.untyped_storage().data_ptr()
    whose = [i for i, t in enumerate(memory) if t.untyped_storage().data_ptr() == storage]
    if len(whose) != 1:
        return None
    return whose[0], tensor.data_ptr() - memory[whose[0]].data_ptr()
