"""What is measured: one case is one call with one dtype on one device, and all its contestants.

The cases of ops come from the op table: every sample with `bench=True`, forward alone or forward
and backward according to whether its tensors require a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops import check
from bigops.bench import agreement, peers, timing
from bigops.bench.machine import memory_bytes
from bigops.check import Comparison
from bigops.ops import Cost, Op, Peer, Sample, explain, use_backend
from bigops.ops.dispatch import decision

OURS, EAGER, COMPILE = "ours", "eager", "compile"
FORWARD, FORWARD_BACKWARD, STEP = "forward", "forward+backward", "step"

# What a run measures unless --dtype says otherwise: float16 is emulated on most CPUs, and float64
# is there for gradcheck.
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}


class Unjudged(Exception):
    """Why a case is timed without knowing its error."""


class Case(ABC):
    """One thing to measure. `subject` and `name` are the record's `op` (or `model`) and `case`."""

    subject: str
    kind = "op"  # or "model"
    name: str
    dtype: torch.dtype
    device: str
    forced: str | None = None  # the backend that was asked for
    compiles = True  # whether torch.compile is a contestant
    sweep: dict[str, Any] | None = None  # {"name": the dimension, "value": its size}
    options = ""  # what a command needs besides the case to measure it so

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

    def left_out(self) -> Mapping[str, str]:
        """Peers that cannot be tried here, with the reason."""
        return {}

    def compiled(self, contestant: str) -> bool:
        """Whether the contestant's first call takes seconds, since torch.compile runs."""
        return contestant == COMPILE

    @abstractmethod
    def disagreement(self, peer: str) -> str | None:
        """None if the peer computes what eager does, else by how much it does not."""

    @abstractmethod
    def runner(self, contestant: str, fresh: bool = False) -> timing.Call:
        """What the contestant does, with its inputs drawn.

        With `fresh`, nothing is run beforehand and there is one input set: for measuring memory.
        """

    @abstractmethod
    def truth(self) -> list[Comparison]:
        """Our errors beside eager's, per tensor.

        Raises:
            Unjudged: the reference is too large for this machine.
        """

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
    """A realistic sample of an op of the table, or one of a sweep over `sweep`."""

    def __init__(
        self,
        op: Op,
        sample: Sample,
        dtype: torch.dtype,
        device: str,
        forced: str | None = None,
        sweep: dict[str, Any] | None = None,
    ) -> None:
        self.op, self.sample = op, sample
        self.subject, self.name = op.name, sample.name
        self.dtype, self.device, self.forced, self.sweep = dtype, device, forced, sweep
        self.compiles = not op.is_step
        self._pool: list[Any] = []
        self._expected: list[agreement.Expected] = []

    @cached_property
    def _one(self) -> Any:
        # Drawn when first needed: a run lists its cases before it measures any of them.
        return self.sample.make(self.device, self.dtype)

    @cached_property
    def _bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in _tensors(self._one))

    @property
    def passes(self) -> str:
        if self.op.is_step:
            return STEP
        differentiable = any(t.requires_grad for t in _tensors(self._one))
        return FORWARD_BACKWARD if differentiable else FORWARD

    @property
    def streams(self) -> str:
        if self.op.is_step:
            return "update"
        # A reduction writes next to nothing.
        return "read" if self.cost().bytes <= 1.05 * self._bytes else "copy"

    @cached_property
    def _peers(self) -> dict[str, Peer]:
        return peers.peers(self.op, self.device, self.dtype)

    def peers(self) -> Sequence[str]:
        return tuple(self._peers)

    def left_out(self) -> Mapping[str, str]:
        return peers.left_out(self.op, self.device, self.dtype)

    def compiled(self, contestant: str) -> bool:
        return contestant == COMPILE or peers.compiles(self.op, contestant)

    def backend(self) -> str:
        args, kwargs = self._one
        with self.as_forced():
            return explain(self.op.function, *args, **kwargs).backend

    def cost(self) -> Cost:
        args, kwargs = self._one
        passes = FORWARD if self.passes == STEP else self.passes
        return self.op.cost(passes, *args, **kwargs)

    def truth(self) -> list[Comparison]:
        if self.too_large:
            raise Unjudged(f"its reference would take {self._reference_bytes / 2**30:.0f} GiB")
        return check.check_sample(self.op, self.sample, self.forced, self.dtype, self.device)

    @cached_property
    def _reference_bytes(self) -> int:
        """In float64, with its gradients: four times the estimate for a float32 forward."""
        if self.op.reference_bytes is None:
            return 0
        args, kwargs = self._one
        _, op_args, _ = decision(self.op.function, *args, **kwargs)
        return 4 * self.op.reference_bytes(*op_args)

    @property
    def too_large(self) -> bool:
        """Whether the reference in float64 does not fit half of the device's memory."""
        return 2 * self._reference_bytes > memory_bytes(self.device)

    def disagreement(self, peer: str) -> str | None:
        # Where a ReLU is near 0 or a window near a tie, the least rounding sends a gradient
        # elsewhere: who computes something else does so with any inputs.
        for draw in range(2):
            if draw == len(self._expected):
                call = self.sample.make(self.device, self.dtype)
                wanted = agreement.expected(self.op.eager, call, exact=not self.too_large)
                self._expected.append(wanted)
            found = self._peers[peer]
            reason = agreement.disagreement(found.function, found.prepare, self._expected[draw])
            if reason is None:
                return None
        return reason

    def runner(self, contestant: str, fresh: bool = False) -> timing.Call:
        count = 1 if fresh else timing.input_sets(self.device, self._bytes)
        while len(self._pool) < count:
            self._pool.append(self._one if fresh else self.sample.make(self.device, self.dtype))
        sets = self._pool[:count]
        peer = self._peers.get(contestant)
        if contestant == OURS:
            function = self.ours
        elif peer is not None:
            function = peer.function
            sets = [peer.prepare(one) for one in sets] if peer.prepare else sets
        else:
            function = self.op.eager
        if contestant == COMPILE:
            function = compiled(function)
        if self.op.is_step:
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
