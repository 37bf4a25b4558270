"""Every op x backend x dtype x sample of the table, by the error rule; purity; torch's promises.

Backends that run on this machine's CPU: native in this process, triton in an interpreted one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import bigops
from bigops import check
from bigops.ops import Op, Sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
OPS = list(bigops.ops.table().values())
CASES = list(check.cases(OPS, [BACKEND]))
AT_LEAST = 200

torch_ops = pytest.mark.parametrize(
    "op", [op for op in OPS if op.schema is not None], ids=lambda op: op.name
)
differentiable = pytest.mark.parametrize(
    "op", [op for op in OPS if op.backward_schema is not None], ids=lambda op: op.name
)


def first_of(result: Any) -> torch.Tensor:
    """An op's output, the first of several."""
    return result[0] if isinstance(result, tuple) else result


def case_id(case: Any) -> str:
    op, sample, backend, dtype = case
    return f"{op.name}-{backend}-{str(dtype)[6:]}-{sample.name}"


def serves(op: Op, sample: Sample, backend: str, dtype: torch.dtype) -> None:
    reason = check.serves(op, sample, backend, dtype, "cpu")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


ran: list[str] = []


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_truth(case: tuple[Op, Sample, str, torch.dtype]) -> None:
    op, sample, backend, dtype = case
    serves(op, sample, backend, dtype)
    for found in check.check_sample(op, sample, backend, dtype):
        assert found.ok, found
    ran.append(case_id(case))


def test_enough_cases_ran(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("keyword") or (
        request.config.args != request.config.getini("testpaths") and not INTERPRETED
    ):
        pytest.skip("only a part of the suite was asked for")
    assert len(ran) >= AT_LEAST


@pytest.mark.skipif(INTERPRETED, reason="it starts the process that this one is")
@pytest.mark.beside([__file__, "-k", "attention and not varlen"], 200)
@pytest.mark.beside([__file__, "-k", "varlen"], 50)
@pytest.mark.beside([__file__, "-k", "not attention"], 185)
def test_interpreted(beside: list[str]) -> None:
    """The same on Triton's interpreter."""
    for output in beside:
        print(output.splitlines()[-1])


class OnlyDeclared(TorchDispatchMode):
    """Rejects ATen ops other than allocation, views and those that the backend declares."""

    FREE = frozenset(
        {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
        | {"view", "reshape", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach"}
        | {"transpose", "t", "permute", "expand", "slice", "select", "narrow", "split", "unbind"}
        | {"unsqueeze", "squeeze"}
    )

    def __init__(self, op: Op, backend: str) -> None:
        super().__init__()
        self.op = op
        (declared,) = [b for b in op.backends if b.name == backend]
        self.allowed = self.FREE | {
            name.removeprefix("aten::").replace("::", ".") for name in declared.aten
        }
        self.rejected: set[str] = set()
        self.called = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "bigops":
            self.called = True
            run = self.op.backward if name.endswith("_backward") else self.op.forward
            with self:
                return run(*args, **(kwargs or {}))
        full = name if func.namespace == "aten" else f"{func.namespace}.{name}"
        if full not in self.allowed:
            self.rejected.add(full)
        return func(*args, **(kwargs or {}))


PURITY = [c for c in CASES if c[0].schema is not None]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter itself calls ATen")
@pytest.mark.parametrize("case", PURITY, ids=case_id)
def test_purity(case: tuple[Op, Sample, str, torch.dtype]) -> None:
    """A backend computes with its own kernels and with the ATen ops that it declares."""
    op, sample, backend, dtype = case
    serves(op, sample, backend, dtype)
    args, kwargs = sample.make("cpu", dtype)
    mode = OnlyDeclared(op, backend)
    with bigops.use_backend(backend):
        # The function's own checks and views are torch's; only the op's inside is watched.
        result = _inside(op, mode, args, kwargs)
        for root in result:
            if root.requires_grad:
                grad = torch.ones_like(root)
                with mode:
                    torch.autograd.backward(root, grad, retain_graph=True)
    assert mode.called
    # Accumulation of gradients, and the gradients of what functions do before the op: the pad of
    # padding="same", the cast of sinks.
    accumulation = {
        "_to_copy",
        "constant_pad_nd",
        "add",
        "add_",
        "zeros_like",
        "clone",
        "copy_",
        "mul",
        "zeros",
    }
    assert mode.rejected <= (accumulation if result[0].requires_grad else set()), mode.rejected


def _inside(op: Op, mode: OnlyDeclared, args: Any, kwargs: Any) -> list[torch.Tensor]:
    call = op.call

    def watched(*op_args: Any) -> Any:
        with mode:
            return call(*op_args)

    op.routes.clear()  # a route does not ask for op.call
    op.call = watched
    try:
        result = op.function(*args, **kwargs)
    finally:
        op.call = call
    return list(result) if isinstance(result, tuple) else [result]


def torch_arguments(op: Op, grad: bool) -> Iterator[tuple[Any, ...]]:
    """The torch op's arguments of the op's first samples."""
    for sample in [s for s in op.samples if not s.bench][:4]:
        if check.serves(op, sample, BACKEND, torch.float32, "cpu") is not None:
            continue
        caught: list[tuple[Any, ...]] = []
        call = op.call
        op.routes.clear()
        op.call = lambda *op_args, caught=caught, call=call: (
            caught.append(op_args) or call(*op_args)
        )
        try:
            args, kwargs = sample.make("cpu", torch.float32)
            with bigops.use_backend(BACKEND):
                op.function(*args, **kwargs)
        finally:
            op.call = call
        yield tuple(
            a.detach().requires_grad_(grad and a.requires_grad)
            if isinstance(a, torch.Tensor)
            else a
            for a in caught[0]
        )


@torch_ops
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_opcheck(op: Op, grad: bool) -> None:
    overload = getattr(torch.ops.bigops, op.name).default
    found = list(torch_arguments(op, grad))
    assert found
    with bigops.use_backend(BACKEND):
        for args in found:
            opcheck(overload, args)


@torch_ops
@pytest.mark.skipif(INTERPRETED, reason="compiled code runs in the native process")
def test_compile_fullgraph(op: Op) -> None:
    sample = next(s for s in op.samples if not s.bench)
    args, kwargs = sample.make("cpu", torch.float32)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    with bigops.use_backend("native"):
        expected, got = op.function(*args, **kwargs), compiled(*args, **kwargs)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        if not leaves:
            return
        wanted = torch.autograd.grad(first_of(expected).sum(), leaves)
        for a, b in zip(torch.autograd.grad(first_of(got).sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@differentiable
def test_func_grad_and_vmap(op: Op) -> None:
    sample = next(s for s in op.samples if s.gradcheck)
    (first, *rest), kwargs = sample.make("cpu", torch.float32)
    rest = [a.detach() if isinstance(a, torch.Tensor) else a for a in rest]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return first_of(op.function(x, *rest, **kwargs)).square().sum()

    with bigops.use_backend(BACKEND):
        leaf = first.detach().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(first.detach()), expected)
        batch = torch.stack([first.detach(), 2 * first.detach()])
        got = torch.vmap(lambda x: first_of(op.function(x, *rest, **kwargs)))(batch)
        for x, out in zip(batch, got, strict=True):
            torch.testing.assert_close(out, first_of(op.function(x, *rest, **kwargs)))


@differentiable
def test_second_gradient_raises(op: Op) -> None:
    sample = next(s for s in op.samples if s.gradcheck)
    (first, *rest), kwargs = sample.make("cpu", torch.float32)
    leaf = first.detach().requires_grad_()
    with bigops.use_backend(BACKEND):
        out = first_of(op.function(leaf, *rest, **kwargs))
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second gradient"):
            torch.autograd.grad(grad.sum(), leaf)


@differentiable
def test_forward_mode_raises(op: Op) -> None:
    """Forward-mode tangents are refused, never dropped."""
    sample = next(s for s in op.samples if s.gradcheck)
    (first, *rest), kwargs = sample.make("cpu", torch.float32)
    rest = [a.detach() if isinstance(a, torch.Tensor) else a for a in rest]
    with bigops.use_backend(BACKEND), pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(
            lambda x: op.function(x, *rest, **kwargs), (first.detach(),), (first.detach(),)
        )


@differentiable
@pytest.mark.skipif(INTERPRETED, reason="float64 is native only")
def test_gradcheck(op: Op) -> None:
    """Our own float64 gradients against finite differences, with any fallback an error."""
    ran = 0
    with bigops.use_backend("native"):
        for sample in op.samples:
            if sample.bench or not sample.gradcheck:
                continue
            args, kwargs = sample.make("cpu", torch.float64)
            assert torch.autograd.gradcheck(lambda *a, k=kwargs: op.function(*a, **k), args)
            ran += 1
    assert ran >= 2


@torch_ops
def test_deterministic(op: Op) -> None:
    for sample in [s for s in op.samples if not s.bench][-3:]:
        if check.serves(op, sample, BACKEND, torch.float32, "cpu") is not None:
            continue
        args, kwargs = sample.make("cpu", torch.float32)
        leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        with bigops.use_backend(BACKEND):
            runs = []
            for _ in range(3):
                torch.manual_seed(0)  # dropout draws
                out = first_of(op.function(*args, **kwargs))
                grads = torch.autograd.grad(out.sum(), leaves) if leaves else ()
                runs.append([out, *grads])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
