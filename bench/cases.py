"""What is measured: one case is one call with one dtype on one device, and all its contestants.

The cases of ops come from the op table: every sample with `bench=True`, forward alone or forward
and backward according to whether its tensors require a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops import check
from bigops.bench import timing
from bigops.bench.peers import peers
from bigops.check import Comparison
from bigops.ops import Cost, Op, Sample, explain, use_backend

OURS, EAGER, COMPILE = "ours", "eager", "compile"
FORWARD, FORWARD_BACKWARD, STEP = "forward", "forward+backward", "step"

# What a run measures unless --dtype says otherwise: float16 is emulated on most CPUs, and float64
# is there for gradcheck.
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}


class Case(ABC):
    """One thing to measure. `subject` and `name` are the record's `op` (or `model`) and `case`."""

    subject: str
    kind = "op"  # or "model"
    name: str
    dtype: torch.dtype
    device: str
    forced: str | None = None  # the backend that was asked for
    compiles = True  # whether torch.compile is a contestant

    @property
    def title(self) -> str:
        return f"{self.subject} {self.name} {dtype_name(self.dtype)}"

    @property
    @abstractmethod
    def passes(self) -> str:
        """The record's `pass`: forward, forward+backward or step."""

    @property
    def streams(self) -> str:
        """The bandwidth that bounds the case: read, copy or update."""
        return "copy"

    @abstractmethod
    def peers(self) -> Sequence[str]:
        """Names of the contestants beside ours, eager and compile."""

    @abstractmethod
    def runner(self, contestant: str, fresh: bool = False) -> timing.Call:
        """What the contestant does, with its inputs drawn.

        With `fresh`, nothing is run beforehand and there is one input set: for measuring memory.
        """

    @abstractmethod
    def truth(self) -> list[Comparison]:
        """Our errors beside eager's, per tensor."""

    @abstractmethod
    def backend(self) -> str:
        """The backend that serves our call."""

    def cost(self) -> Cost | None:
        """Operations and bytes of one call."""
        return None

    def as_forced(self) -> AbstractContextManager[None]:
        """Run our side within this."""
        return use_backend(self.forced)


class OpCase(Case):
    """A realistic sample of an op of the table."""

    def __init__(
        self, op: Op, sample: Sample, dtype: torch.dtype, device: str, forced: str | None = None
    ) -> None:
        self.op, self.sample = op, sample
        self.subject, self.name = op.name, sample.name
        self.dtype, self.device, self.forced = dtype, device, forced
        self.compiles = not op.mutates
        self._pool: list[Any] = []

    @cached_property
    def _one(self) -> Any:
        # Drawn when first needed: a run lists its cases before it measures any of them.
        return self.sample.make(self.device, self.dtype)

    @cached_property
    def _bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in _tensors(self._one))

    @property
    def passes(self) -> str:
        if self.op.mutates:
            return STEP
        differentiable = any(t.requires_grad for t in _tensors(self._one))
        return FORWARD_BACKWARD if differentiable else FORWARD

    @property
    def streams(self) -> str:
        if self.op.mutates:
            return "update"
        # A reduction writes next to nothing.
        return "read" if self.cost().bytes <= 1.05 * self._bytes else "copy"

    def peers(self) -> Sequence[str]:
        return tuple(peers(self.op, self.device))

    def backend(self) -> str:
        args, kwargs = self._one
        with self.as_forced():
            return explain(self.op.function, *args, **kwargs).backend

    def cost(self) -> Cost:
        args, kwargs = self._one
        passes = FORWARD if self.passes == STEP else self.passes
        return self.op.cost(passes, *args, **kwargs)

    def truth(self) -> list[Comparison]:
        return check.check_sample(self.op, self.sample, self.forced, self.dtype, self.device)

    def runner(self, contestant: str, fresh: bool = False) -> timing.Call:
        count = 1 if fresh else timing.input_sets(self.device, self._bytes)
        while len(self._pool) < count:
            self._pool.append(self._one if fresh else self.sample.make(self.device, self.dtype))
        sets = self._pool[:count]
        peer = peers(self.op, self.device).get(contestant)
        if contestant == OURS:
            function = self.ours
        elif peer is not None:
            function = peer.function
            sets = [peer.prepare(one) for one in sets] if peer.prepare else sets
        else:
            function = self.op.eager
        if contestant == COMPILE:
            function = compiled(function)
        if self.op.mutates:
            sets = [_copies(one) for one in sets]
        return call_of(function, sets, fresh)

    @property
    def ours(self) -> Callable[..., Any]:
        """Our function, called as eager is: entering a block takes as long as a small op."""
        return self.op.function if self.forced is None else self._forced_function

    def _forced_function(self, *args: Any, **kwargs: Any) -> Any:
        with self.as_forced():
            return self.op.function(*args, **kwargs)


def call_of(function: Callable[..., Any], sets: Sequence[Any], fresh: bool = False) -> timing.Call:
    """Forward, and backward if an input requires it, on the input set that the index picks."""
    leaves = [[t for t in _tensors(one) if t.requires_grad] for one in sets]
    if not leaves[0]:
        return lambda index: function(*sets[index % len(sets)][0], **sets[index % len(sets)][1])

    def gradients(args: Any, kwargs: Any) -> list[Tensor]:
        return [torch.randn_like(root) for root in _roots(function(*args, **kwargs))]

    drawn = [] if fresh else [gradients(*one) for one in sets]

    def forward_backward(index: int) -> Any:
        which = index % len(sets)
        args, kwargs = sets[which]
        roots = _roots(function(*args, **kwargs))
        grads = [torch.randn_like(root) for root in roots] if fresh else drawn[which]
        return torch.autograd.grad(roots, leaves[which], grads, allow_unused=True)

    return forward_backward


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, with nothing left over from other cases."""
    # Each shape of one function is a recompilation, and beyond a few Dynamo silently runs eager.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _roots(result: Any) -> list[Tensor]:
    return [t for t in _tensors(result) if t.requires_grad]


def _copies(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)
