"""What the ops' random calls are made of: how a tensor lies in memory, and one thing made wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .declare import Call, Chooser, Sample


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: dense or, with NaN wherever it has no element, otherwise.

    order: its dimensions, from the outermost in memory to the innermost. steps: for each dimension
    the places from one element to the next, as of a slice; 0: expanded. offset: places before the
    first element.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int = 0

    def laid(self, values: Tensor) -> Tensor:
        """`values` lying so; of an expanded dimension the first ones."""
        if self == dense(values.dim()):
            return values
        sizes = [n * s if s else min(n, 1) for n, s in zip(values.shape, self.steps, strict=True)]
        places = [sizes[d] for d in self.order]
        nothing = float("nan") if values.dtype.is_floating_point else 1
        memory = values.new_full((self.offset + torch.Size(places).numel(),), nothing)
        inverse = [self.order.index(d) for d in range(len(self.order))]
        whole = memory[self.offset :].view(places).permute(inverse)
        found = whole[tuple(slice(None, None, step or 1) for step in self.steps)]
        first = tuple(slice(None if step else 1) for step in self.steps)
        return found.copy_(values[first]).expand(values.shape)

    def __str__(self) -> str:
        order = "".join(map(str, self.order))
        words = [f"order {order}"] if list(self.order) != sorted(self.order) else []
        words += [f"step {step} in {d}" for d, step in enumerate(self.steps) if step > 1]
        words += [f"expanded in {d}" for d, step in enumerate(self.steps) if step == 0]
        words += [f"from {self.offset}"] if self.offset else []
        return f" ({', '.join(words)})" if words else ""


def dense(dims: int) -> Layout:
    """A contiguous tensor's."""
    return Layout(tuple(range(dims)), (1,) * dims)


def layout(choose: Chooser, dims: int, *, expanded: int = 0) -> Layout:
    """A tensor's: dense every second time; perhaps expanded in one of the first dimensions."""
    if choose.choice((True, False)):
        return dense(dims)
    rest = list(range(dims))
    order = tuple(rest.pop(choose.integer(0, len(rest) - 1)) for _ in range(dims))
    steps = [1] * dims
    if (sliced := choose.choice((None, *range(dims)))) is not None:
        steps[sliced] = choose.choice((2, 3))
    if (repeated := choose.choice((None, *range(expanded)))) is not None:
        steps[repeated] = 0
    return Layout(order, tuple(steps), choose.choice((0, 1, 3, 8)))


def sizes(shape: Sequence[int]) -> str:
    """2x3x4; a scalar's is ()."""
    return "x".join(map(str, shape)) or "()"


Arguments = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One thing made wrong in a legal call.

    argument: the name that the error must begin with. what: what it is now, in words. change: takes
    the call's arguments by name and returns those to replace.
    """

    argument: str
    what: str
    change: Callable[[Arguments], Arguments]


def instead(argument: str, *values: Any) -> list[Fault]:
    """`argument` has one of `values`, whatever it had."""
    return [Fault(argument, repr(v), lambda _, v=v: {argument: v}) for v in values]  # type: ignore[misc]


def changed(argument: str, what: str, change: Callable[[Any], Any]) -> Fault:
    """What `argument` had is changed."""
    return Fault(argument, what, lambda given: {argument: change(given[argument])})


def spoilt(sample: Sample, names: Sequence[str], fault: Fault) -> tuple[Sample, str]:
    """`sample`, whose positional arguments are called `names`, with the fault in it."""

    def make(device: str, dtype: torch.dtype) -> Call:
        args, kwargs = sample.make(device, dtype)
        given = dict(zip(names, args, strict=False)) | kwargs
        return (), given | fault.change(given)

    name = f"{fault.argument} {fault.what} in {sample.name}"
    return replace(sample, name=name, make=make), fault.argument


def other_dtype(t: Tensor) -> Tensor:
    """`t` in another floating dtype."""
    return t.to(torch.float64 if t.dtype == torch.float32 else torch.float32)


def on_meta(t: Tensor) -> Tensor:
    """`t` on a device that no other argument is on."""
    return t.to("meta")


def longer(dim: int) -> Callable[[Tensor], Tensor]:
    """A change that adds an element along a dimension."""
    return lambda t: torch.cat((t, t.new_zeros(t.shape).sum(dim, keepdim=True)), dim)
