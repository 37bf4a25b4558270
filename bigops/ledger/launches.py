"""The launches of a call on a GPU that is not here.

The real launchers run on CPU tensors: `hardware.pretend` tells them which GPU to choose for, a
driver without a device tells Triton which target to specialise for, and Triton's hook before a
compilation takes down what would be compiled and refuses it, so that nothing is launched. What is
recorded is what a call launches: the same configuration, specialised on the same strides and
alignment. It is text, which another process compiles.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..backends import triton as backend
from ..ops import Op, Sample
from ..ops.declare import Backend, Call
from ..ops.dispatch import decision
from .architectures import Architecture
from .source import source_hash

DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
}
# Of the options that a launcher may give, those that change the code.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "waves_per_eu")

# What Triton 3.9 does not compile for AMD ("PassManager::run failed"), by kernel and call: not
# listed there.
NOT_ON_AMD = {("grad_key_value_kernel", "128, mask")}


@dataclass(frozen=True)
class Launch:
    """What Triton is asked to compile for a call: `data`, in Triton's own words.

    key: a hash of the kernel's source, of `data` and of the target: what the code depends on, the
    version of Triton aside. call: the sample's name; dtype: "tf32" is fp32 with torch's flags set.
    step: "forward" or "backward", with a number where it launches the kernel in several ways.
    """

    kernel: str
    module: str
    op: str
    call: str
    dtype: str
    step: str
    target: str
    key: str
    config: str
    data: str


class Driver:
    """As much of a driver as it takes to specialise and to compile."""

    def __init__(self, architecture: Architecture) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture = architecture
        arch = architecture.name if architecture.amd else architecture.capability
        self.target = GPUTarget(architecture.backend, arch, architecture.lanes)

    def get_current_device(self) -> str:
        return self.architecture.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def compiling_for(architecture: Architecture) -> Iterator[None]:
    """Inside, Triton compiles for `architecture` and launchers choose for it.

    Triton keeps the target afterwards: a process that does this launches nothing itself.
    """
    from triton.runtime import driver

    from ..kernels import hardware

    here = hardware.Hardware(architecture.name, architecture.multiprocessors, architecture.shared)
    driver.set_active(Driver(architecture))
    with hardware.pretend(here), backend.compiling():
        yield


@contextmanager
def recorded(take: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Inside, a launch only calls `take` with the kernel and what it would be compiled from."""
    from triton import knobs

    def refuse(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        take(fn.jit_function, compile)
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


@dataclass
class Context:
    """What an op saves for its backward: as much of autograd's context as `setup_context` sees."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...] = ()
    materialize: bool = True
    without_gradient: list[Tensor] = field(default_factory=list)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.without_gradient += tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value

    def gradients(self, outputs: Sequence[Any]) -> Iterator[tuple[Tensor | None, ...]]:
        """Gradients of all outputs and, where an op takes None for one, of the first alone."""
        whole = [
            torch.empty_like(out) if _differentiable(out, self.without_gradient) else None
            for out in outputs
        ]
        if not self.materialize and any(grad is not None for grad in whole[1:]):
            yield whole[0], *(None for _ in whole[1:])
        yield tuple(whole)


def _differentiable(out: Any, without_gradient: list[Tensor]) -> bool:
    tensor = isinstance(out, Tensor) and out.is_floating_point()
    return tensor and all(out is not other for other in without_gradient)


def _fails_there(launch: Launch) -> bool:
    return (launch.kernel, launch.call) in NOT_ON_AMD


def launches(op: Op, architectures: Sequence[Architecture]) -> list[Launch]:
    """All that the calls of `op.configurations`, or of its samples, launch: each once."""
    backends = [b for b in op.backends if b.name == "triton" or b.launches_triton]
    found: dict[tuple[str, str, str], Launch] = {}
    for sample in op.configurations() if op.configurations else op.samples:
        for dtype in sample.dtypes or op.dtypes:
            if dtype not in DTYPES:
                continue
            call = sample.make("cpu", dtype)
            for name in (DTYPES[dtype], "tf32") if dtype == torch.float32 else (DTYPES[dtype],):
                for served, architecture in product(backends, architectures):
                    for launch in _call(op, served, sample, call, name, architecture):
                        if launch.target.startswith("gfx") and _fails_there(launch):
                            continue
                        same = (launch.kernel, launch.target, launch.key)
                        found.setdefault(same, launch)
    order = [architecture.name for architecture in architectures]
    # Calls keep the order in which they are declared.
    return sorted(found.values(), key=lambda launch: (launch.kernel, order.index(launch.target)))


def _call(
    op: Op, served: Backend, sample: Sample, call: Call, dtype: str, architecture: Architecture
) -> Iterator[Launch]:
    taken: list[tuple[str, Any, dict[str, Any]]] = []
    step = "forward"

    def take(kernel: Any, compile: dict[str, Any]) -> None:
        taken.append((step, kernel, compile))

    with (
        torch.no_grad(),
        _fp32_products("tf32" if dtype == "tf32" else "ieee"),
        compiling_for(architecture),
        recorded(take),
    ):
        args, kwargs = call
        with torch.enable_grad():  # what a gradient needs is among the arguments
            _, op_args, beyond = decision(op.function, *args, **kwargs)
        if beyond is not None or served.why_not(*op_args) is not None:
            return
        outputs = served.forward(*op_args)
        step = "backward"
        for backward_args in _backward_args(op, op_args, outputs):
            assert served.backward is not None
            served.backward(*backward_args)
    several: dict[tuple[str, str], list[str]] = {}
    for step, kernel, compile in taken:
        key = _key(kernel, compile["specialization_data"], architecture)
        keys = several.setdefault((kernel.__name__, step), [])
        if key in keys:
            continue
        keys.append(key)
        yield Launch(
            kernel=kernel.__name__,
            module=kernel.fn.__module__,
            op=op.name,
            call=sample.name,
            dtype=dtype,
            step=step if len(keys) == 1 else f"{step} {len(keys)}",
            target=architecture.name,
            key=key,
            config=_config(kernel, compile),
            data=compile["specialization_data"],
        )


def _backward_args(op: Op, op_args: tuple[Any, ...], outputs: Any) -> Iterator[tuple[Any, ...]]:
    needs = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in op_args)
    if op.setup_context is None or op.backward_args is None or not any(needs):
        return
    ctx = Context(needs)
    op.setup_context(ctx, op_args, outputs)
    for grads in ctx.gradients(outputs if isinstance(outputs, tuple) else (outputs,)):
        if (args := op.backward_args(ctx, *grads)) is not None:
            yield args


@contextmanager
def _fp32_products(precision: str) -> Iterator[None]:
    """torch's flags for products of fp32: "ieee" or "tf32"."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = precision
        yield
    finally:
        for flag, old in zip(flags, before, strict=True):
            flag.fp32_precision = old


def _key(kernel: Any, data: str, architecture: Architecture) -> str:
    """The same by every version of Triton."""
    asked = json.loads(data)
    attributes = zip(asked["attrs_keys"], asked["attrs_vals"], strict=True)
    parts = [
        asked["signature"],
        asked["constant_keys"],
        asked["constant_vals"],
        [pair for pair in attributes if pair[1]],  # some versions list those without any
        [asked["options"].get(name) for name in OPTIONS],
    ]
    text = f"{source_hash(kernel)} {json.dumps(parts)} {architecture.name}"
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _config(kernel: Any, compile: dict[str, Any]) -> str:
    """The compile-time arguments, and the pointers that are not given."""
    words = []
    for (place, *inner), value in compile["constants"].items():
        parameter = kernel.params[place]
        if inner or not (parameter.is_constexpr or value is None):
            continue
        if isinstance(value, bool):
            value = int(value)
        words.append(f"{parameter.name}={value}")
    return " ".join([*words, f"warps={compile['num_warps']}", f"stages={compile['num_stages']}"])


def compiled(launch: Launch) -> Any:
    """Triton's compiled kernel, to be called inside `compiling_for` its target."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    return kernel.preload(launch.data)
