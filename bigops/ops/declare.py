"""The declaration of an op: said once, read by dispatch, tests, check, bench and inspect.

    OP = declare(Op(name="attention", schema="(Tensor query, ...) -> (Tensor, Tensor)", ...))

registers the torch ops `bigops::attention` and `bigops::attention_backward` with their autograd
and fake implementations, and enters the op into `bigops.ops.table()`. A package outside this one
declares its own ops with the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import dispatch

Call = tuple[tuple[Any, ...], dict[str, Any]]


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
    call besides allocation and views, each with its reason.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    aten: Mapping[str, str] = field(default_factory=dict)

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


@dataclass(frozen=True, eq=False)
class Op:
    """An op's declaration.

    name: the public name. schema, backward_schema: torch schemas without the name (None for an op
    that is no torch op, such as an optimizer's step).
    function: what users call; under use_backend("reference") it is the definition of right.
    eager: torch as a user would write it with the same arguments, the baseline for error and speed.
    backends: in order of preference.
    fake, backward_fake: outputs without data, sizes and strides as on every backend.
    setup_context, autograd: torch.library.register_autograd's pair.
    forward_args: the forward's arguments, read out of the backward's.
    samples: see `Sample`. dtypes: what the fast backends take.
    cost(passes, *args, **kwargs): of the public call; passes is "forward" or "forward+backward".
    reference_bytes(*op_args): what the reference allocates beyond its output.
    mutates: names of the arguments that the function updates in place.
    peers: see `Peer`.
    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    backends: tuple[Backend, ...]
    samples: tuple[Sample, ...]
    dtypes: tuple[torch.dtype, ...]
    cost: Callable[..., Cost]
    schema: str | None = None
    backward_schema: str | None = None
    fake: Callable[..., Any] | None = None
    backward_fake: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    autograd: Callable[..., Any] | None = None
    forward_args: Callable[..., tuple[Any, ...]] | None = None
    reference_bytes: Callable[..., int] | None = None
    mutates: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    device_of: Callable[[tuple[Any, ...]], str] = _first_tensor_device

    def forward(self, *args: Any) -> Any:
        """Run the torch op's forward on the backend of choice."""
        return dispatch.backend_for(self, args).forward(*args)

    def backward(self, *args: Any) -> Any:
        """Run the torch op's backward on the backend of choice."""
        assert self.forward_args is not None
        backend = dispatch.backend_for(self, self.forward_args(*args))
        assert backend.backward is not None
        return backend.backward(*args)


_table: dict[str, Op] = {}
_library = torch.library.Library("bigops", "FRAGMENT")


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
    if op.schema is not None:
        _define(op.name, op.schema, op.forward, op.fake)
        assert op.setup_context is not None and op.autograd is not None
        _register_autograd(op.name, op.setup_context, op.autograd)
        assert op.backward_schema is not None
        _define(f"{op.name}_backward", op.backward_schema, op.backward, op.backward_fake)
        _register_autograd(f"{op.name}_backward", _save_nothing, _no_second_gradient(op.name))
    _table[op.name] = op
    return op


def _define(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any] | None
) -> None:
    _library.define(f"{name}{schema}", tags=[torch.Tag.pt2_compliant_tag])
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    assert fake is not None
    torch.library.register_fake(f"bigops::{name}", fake, lib=_library)


def _register_autograd(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Give the torch op its gradient.

    `torch.library.register_autograd` does not serve torch.func.grad (its Function has no
    setup_context), so the op's Autograd key is our own Function. What that needs from torch is
    private: probed, with the public way as the fallback.
    """
    try:
        from torch._C import _are_functorch_transforms_active as functorch_active
        from torch._C import _AutoDispatchBelowAutograd as below_autograd
        from torch._functorch.utils import enable_single_level_autograd_function
    except ImportError:
        torch.library.register_autograd(
            f"bigops::{name}", backward, setup_context=setup_context, lib=_library
        )
        return
    overload = getattr(torch.ops.bigops, name).default

    def run(*args: Any) -> Any:
        with below_autograd():
            return overload(*args)

    function = type(
        f"{name}_autograd",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(run),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )

    # Past Function.apply, which would hand the call to functorch: the dispatcher has already given
    # functorch its turn when an Autograd kernel runs.
    record = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        if functorch_active():
            with enable_single_level_autograd_function():
                return record(*args)
        return record(*args)

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            return apply(*args)
        return run(*args)

    _library.impl(name, autograd, "Autograd")


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"bigops.{name}: the fast backends have no second gradient; "
            'run it under bigops.use_backend("reference")'
        )

    return backward


def needs_grad(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
