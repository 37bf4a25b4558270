"""The declaration of an op: said once, read by dispatch, tests, check, bench and inspect.

    OP = declare(Op(name="attention", schema="(Tensor query, ...) -> (Tensor, Tensor)", ...))

registers the torch ops `bigops::attention` and `bigops::attention_backward` with their autograd
and fake implementations, and enters the op into `bigops.ops.table()`. A package outside this one
declares its own ops with the same call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..backends import triton
from . import dispatch, ranges
from .registration import (
    TorchOp,
    no_gradient,
    no_second_gradient,
    recording,
    save_nothing,
    watched,
)
from .route import Route

Call = tuple[tuple[Any, ...], dict[str, Any]]
T = TypeVar("T")


class Chooser(Protocol):
    """Where a random call's sizes and arguments come from.

    Hypothesis in the tests, which shrinks what fails towards `low` and the first of `options`: put
    the simplest there. `random.Random` serves elsewhere.
    """

    def integer(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        ...

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`."""
        ...


@dataclass(frozen=True)
class Sample:
    """One call of an op's public function.

    `make(device, dtype)` draws fresh random inputs from torch's generator and returns
    (args, kwargs); tensors whose gradient is checked require it already. Samples with `bench` are
    realistic sizes and are timed; the others are small and are checked on every backend.
    """

    name: str
    make: Callable[[str, torch.dtype], Call]
    bench: bool = False
    gradcheck: bool = False  # small and smooth enough for finite differences in float64
    dtypes: tuple[torch.dtype, ...] = ()  # empty: all of the op's


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and the fewest bytes a call must move."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Peer:
    """Another way that torch offers for an op's call: a contestant for `best` in the benchmark.

    `function` takes the arguments of the op's function; `prepare` changes a call once, outside the
    clock (channels_last inputs and weights, say).
    """

    name: str
    function: Callable[..., Any]
    prepare: Callable[[Call], Call] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `why_not(*op_args)` answers None when it serves the call, else the reason in words;
    `forward` and `backward` take the arguments of the torch ops. `aten` names the ATen ops it may
    call besides allocation and views, each with its reason. launches_triton: on a GPU it launches
    Triton kernels without being called so; the compile ledger has them too.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    aten: Mapping[str, str] = field(default_factory=dict)
    launches_triton: bool = False

    @classmethod
    def native(
        cls, module: str, devices: tuple[str, ...] = ("cpu",), aten: Mapping[str, str] | None = None
    ) -> Backend:
        """The C++ kernels that `module` launches; see `triton`."""
        return cls._of(module, "native", devices, aten)

    @classmethod
    def triton(cls, module: str, aten: Mapping[str, str] | None = None) -> Backend:
        """The Triton kernels that `module` launches: its functions `forward` and `backward`, and
        `why_not` unless it serves every call. It is imported when a call first asks for it."""
        return cls._of(module, "triton", ("cuda", "cpu"), aten)

    @classmethod
    def _of(
        cls, module: str, name: str, devices: tuple[str, ...], aten: Mapping[str, str] | None
    ) -> Backend:
        loaded: list[Any] = []

        def load() -> None:
            if not loaded:
                loaded.append(importlib.import_module(module))

        # What torch.compiler.assume_constant_result does (its own import takes seconds): Dynamo,
        # which cannot trace an import, makes the call.
        load._dynamo_marked_constant = True  # type: ignore[attr-defined]

        def why_not(*args: Any) -> str | None:
            if name == "triton" and (reason := triton.why_not(_first_tensor_device(args))):
                return reason
            load()
            ask = getattr(loaded[0], "why_not", None)
            return None if ask is None else ask(*args)

        def forward(*args: Any) -> Any:
            load()
            return loaded[0].forward(*args)

        def backward(*args: Any) -> Any:
            load()
            return loaded[0].backward(*args)

        return cls(name, devices, why_not, forward, backward, aten or {})

    def automatic(self, device: str) -> bool:
        """Whether it may be chosen unforced: interpreted Triton never is."""
        return not (self.name == "triton" and device == "cpu")


def _first_tensor_device(args: tuple[Any, ...]) -> str:
    first = args[0]
    while isinstance(first, list | tuple):
        if not first:
            return "cpu"
        first = first[0]
    return first.device.type


@dataclass(eq=False)
class Op:
    """An op's declaration.

    name: the public name. schema, backward_schema: torch schemas without the name (None for an op
    that is no torch op, such as an optimizer's step; the second alone: for one without gradient).
    function: what users call; under use_backend("reference") it is the definition of right.
    eager: torch as a user would write it with the same arguments, the baseline for error and speed.
    backends: in order of preference.
    fake, backward_fake: outputs without data, sizes and strides as on every backend.
    setup_context: as of torch.autograd.Function. backward_args(ctx, *grads): the backward's
    arguments, None when there is nothing to differentiate; its results are the gradients of the
    forward's first arguments. forward_args: the forward's arguments, read out of the backward's.
    Without these three, the backward takes the outputs' gradients and then the forward's arguments.
    samples: see `Sample`.
    arbitrary(choose): a small random legal call: any shapes, strides and arguments that the
    function takes, drawn with a `Chooser`. illegal(choose): a random call that the function must
    refuse with a TypeError or a ValueError, and the name of the argument that is wrong.
    configurations(): calls that together make the Triton launchers choose every configuration they
    have, for the compile ledger; None: the samples do.
    dtypes: those held against the float64 reference (float64 itself, which
    has no better reference, is held by gradcheck).
    cost(passes, *args, **kwargs): of the public call; passes is "forward" or "forward+backward".
    reference_bytes(*op_args): what the reference allocates beyond its output.
    mutates: names of the arguments that the function updates in place.
    same_draws: what stands for eager where errors are compared, with the random numbers that the
    function draws under use_backend("reference"); None: it draws none.
    peers: see `Peer`.
    sweeps: for `bench --sweep`: the dimensions that may vary, each with what makes the sample of a
    size on a kind of device ("cpu", "cuda"), everything else fixed or such that the work fits.
    call, call_backward: the torch ops, there once declared. routes: see route.py.
    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    backends: tuple[Backend, ...]
    samples: tuple[Sample, ...]
    cost: Callable[..., Cost]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    arbitrary: Callable[[Chooser], Sample] | None = None
    illegal: Callable[[Chooser], tuple[Sample, str]] | None = None
    configurations: Callable[[], Iterable[Sample]] | None = None
    schema: str | None = None
    backward_schema: str | None = None
    fake: Callable[..., Any] | None = None
    backward_fake: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    backward_args: Callable[..., tuple[Any, ...] | None] | None = None
    forward_args: Callable[..., tuple[Any, ...]] | None = None
    reference_bytes: Callable[..., int] | None = None
    mutates: tuple[str, ...] = ()
    same_draws: Callable[..., Any] | None = None
    peers: tuple[Peer, ...] = ()
    sweeps: Mapping[str, Callable[[int, str], Sample]] = field(default_factory=dict)
    device_of: Callable[[tuple[Any, ...]], str] = _first_tensor_device
    call: Callable[..., Any] = field(init=False, repr=False)
    call_backward: Callable[..., Any] = field(init=False, repr=False)
    routes: dict[Any, Route] = field(init=False, default_factory=dict)
    _recorded: dict[tuple[str, ...], Callable[..., Any]] = field(init=False, default_factory=dict)

    @property
    def is_step(self) -> bool:
        """Whether all that comes of a call is what it writes, as of an optimizer's step."""
        return bool(self.mutates) and self.schema is None

    def forward(self, *args: Any) -> Any:
        """Run the torch op's forward on the backend of choice."""
        return dispatch.backend_for(self, args).forward(*args)

    def backward(self, *args: Any) -> Any:
        """Run the torch op's backward on the backend of choice."""
        assert self.forward_args is not None
        backend = dispatch.backend_for(self, self.forward_args(*args))
        assert backend.backward is not None
        return backend.backward(*args)

    def differentiate(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The backward of the torch op's node."""
        assert self.backward_args is not None
        args = self.backward_args(ctx, *grads)
        return self._padded(() if args is None else self.call_backward(*args), ctx)

    def recorded(self, backend: Backend) -> Callable[..., Any]:
        """The forward of `backend`, leaving a node whose backward is its too."""
        key = (backend.name, *backend.devices)
        if key not in self._recorded:
            assert self.setup_context is not None
            self._recorded[key] = recording(
                self.name, backend.forward, self.setup_context, self._backward_of(backend)
            )
        return self._recorded[key]

    def forget(self) -> None:
        """Forget what earlier calls decided; their backends have changed."""
        self.routes.clear()
        self._recorded.clear()

    def _backward_of(self, backend: Backend) -> Callable[..., Any]:
        short, arguments, padding = backend.backward, self.backward_args, ()
        assert short is not None
        assert arguments is not None

        # One frame: each further one would cost as much as a tensor.
        def backward(ctx: Any, *grads: Any) -> Any:
            nonlocal padding
            args = arguments(ctx, *grads)
            if args is None or torch.is_grad_enabled() or watched():
                return self._padded(() if args is None else self.call_backward(*args), ctx)
            found = short(*args)
            if found.__class__ is not tuple:  # one gradient
                found = (found,)
            padding = padding or self._padded(found, ctx)[len(found) :]
            return found + padding

        return backward

    def _padded(self, found: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(found, Tensor):
            found = (found,)
        return (*found, *(None,) * (len(ctx.needs_input_grad) - len(found)))


_table: dict[str, Op] = {}


def table() -> Mapping[str, Op]:
    """All declared ops by name."""
    return dict(_table)


def get(name: str) -> Op:
    """The declaration called `name`; ValueError with the known names otherwise."""
    if name not in _table:
        raise ValueError(f"unknown op {name!r}; known: {', '.join(sorted(_table))}")
    return _table[name]


def declare(op: Op) -> Op:
    """Register `op` with torch and enter it into the table."""
    if op.name in _table:
        raise ValueError(f"op {op.name!r} is declared already")
    if op.schema is not None and op.backward_schema is None:
        refuse = no_gradient(op.name)
        op.call = _torch_op(op.name, op.schema, op.forward, op.fake, save_nothing, refuse)
        op.call_backward = refuse
    elif op.schema is not None:
        _save_what(op)
        op.call = _torch_op(
            op.name, op.schema, op.forward, op.fake, op.setup_context, op.differentiate
        )
        name = f"{op.name}_backward"
        op.call_backward = _torch_op(
            name,
            op.backward_schema,
            op.backward,
            op.backward_fake,
            save_nothing,
            no_second_gradient(op.name),
        )
    _table[op.name] = op
    ranges.declared(op)
    return op


def _save_what(op: Op) -> None:
    """Where an op does not say what its backward needs: all of the forward's arguments."""
    road = (op.setup_context, op.backward_args, op.forward_args)
    if any(road):
        if not all(road):
            raise ValueError(
                f"op {op.name!r} has a schema but only a part of setup_context, backward_args and "
                "forward_args"
            )
        return

    def after_gradients(*args: Any) -> tuple[Any, ...]:
        return args[len(getattr(torch.ops.bigops, op.name).default._schema.returns) :]

    op.setup_context, op.backward_args = _save_inputs, _gradients_and_inputs
    op.forward_args = after_gradients


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
    ctx.options = [None if isinstance(a, Tensor) else a for a in inputs]


def _gradients_and_inputs(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    inputs = zip(ctx.saved_tensors, ctx.options, strict=True)
    return (*grads, *(option if tensor is None else tensor for tensor, option in inputs))


def _torch_op(name: str, *parts: Any) -> TorchOp:
    missing = [part for part in parts if part is None]
    if missing:
        raise ValueError(f"op {name!r} has a schema but not its fake or backward's schema")
    return TorchOp(name, *parts)
