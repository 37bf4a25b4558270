"""kernels/launch.py: a call that repeats another does the same with its own tensors.

In an interpreted process, where what Triton would have compiled is the interpreted kernel, called
as a compiled one is: arguments by place, pointers as numbers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

import bigops
from bigops import check
from bigops.kernels import hardware
from bigops.kernels import launch as launching
from bigops.kernels.launch import launch, made, replayed
from bigops.ops import Op, Sample

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = [op for op in bigops.ops.table().values() if op.schema is not None]


@triton.jit
def sum_kernel(x_ptr, y_ptr, out_ptr, stride_x, size, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs * stride_x, mask=mask)
    tl.store(out_ptr + offs, x + tl.load(y_ptr + offs, mask=mask), mask=mask)


class Compiled:
    """An interpreted kernel in place of a compiled one."""

    metadata = SimpleNamespace()  # Triton 3.6 says nothing of scratch memory for AMD's GPUs

    def __init__(self, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        self.kernel = kernel
        given = [*args, *(meta.get(name) for name in kernel.arg_names[len(args) :])]
        self.dtypes = [arg.dtype if isinstance(arg, Tensor) else None for arg in given]

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            assert len(args) == len(self.dtypes)
            found = [self.at(*pair) for pair in zip(args, self.dtypes, strict=True)]
            run_interpreted(self.kernel, *found, grid=grid, warmup=False)

        return run

    @staticmethod
    def at(arg: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None:
            return arg
        assert isinstance(arg, int)
        if arg == 0:
            return torch.empty(0, dtype=dtype)
        memory = (ctypes.c_char * dtype.itemsize).from_address(arg)
        return torch.frombuffer(memory, dtype=dtype)


def run_interpreted(kernel: Any, *args: Any, **kwargs: Any) -> None:
    raise AssertionError("the fixture puts Triton's own here")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call that is repeated."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setitem(globals(), "run_interpreted", InterpretedFunction.run)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Compiled:
        run_interpreted(kernel, *args, grid=grid, warmup=warmup, **meta)
        return Compiled(kernel, args, meta)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    counted: list[int] = []
    repeat = launching.Plan.run

    def counting(*args: Any) -> Any:
        counted.append(1)
        return repeat(*args)

    monkeypatch.setattr(launching.Plan, "run", counting)
    return counted


@contextmanager
def as_written() -> Iterator[None]:
    before, launching.Plan.addresses = launching.Plan.addresses, lambda self, args: None  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        launching.Plan.addresses = before  # type: ignore[method-assign]


def launcher(change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Tensor]:
    """x + y, of vectors; `change` comes between the call and its launch."""

    @replayed
    def add(x: Tensor, y: Tensor) -> Tensor:
        out = made(torch.empty_like(y))
        launch(sum_kernel, (1,), change(x), y, out, x.stride(0), len(y), BLOCK=16)
        return out

    return add


if INTERPRETED:

    @pytest.mark.usefixtures("nan_memory")
    @pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
    def test_samples_repeat_to_the_bit(op: Op, replays: list[int]) -> None:
        dtype = torch.float32
        tried: list[Sample] = []
        for sample in op.samples:
            if sample.bench or check.serves(op, sample, "triton", dtype, "cpu"):
                continue
            first, second = (sample.make("cpu", dtype) for _ in range(2))
            with bigops.use_backend("triton"):
                check._run(op, op.function, *first)
                got = check._run(op, op.function, *second)
                with as_written():
                    wanted = check._run(op, op.function, *second)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
            tried.append(sample)
        # Forward and backward; tensors of odd sizes lie at odd addresses now and then.
        least = len(tried) if op.backward_schema is not None or op.schema is None else 10
        assert len(replays) > least
        assert len(tried) > 10

    def test_repeats_with_its_own_tensors(replays: list[int]) -> None:
        add = launcher()
        for calls in range(3):
            x, y = torch.randn(2, 12).unbind() if calls == 1 else torch.randn(2, 16)[:, :12]
            assert torch.equal(add(x, y), x + y)
            assert len(replays) == calls

    def test_one_tensor_given_twice_is_no_example(replays: list[int]) -> None:
        add, x, y = launcher(), torch.randn(8), torch.randn(8)
        assert torch.equal(add(x, x), x + x)
        assert torch.equal(add(x, y), x + y)
        assert torch.equal(add(y, x), x + y)
        assert torch.equal(add(y, y), y + y)
        assert len(replays) == 2

    def test_a_view_moves_with_its_tensor(replays: list[int]) -> None:
        add = launcher(lambda x: x[5:])
        for _ in range(2):
            x, y = torch.randn(16), torch.randn(8)
            assert torch.equal(add(x, y), x[5:13] + y)
        assert len(replays) == 1

    def test_memory_that_nobody_has_made_is_not_repeated(replays: list[int]) -> None:
        add = launcher(torch.clone)
        for _ in range(3):
            x, y = torch.randn(2, 8)
            assert torch.equal(add(x, y), x + y)
        assert not replays

    def test_other_addresses_run_as_written(replays: list[int]) -> None:
        add = launcher()
        aligned, odd = torch.randn(8), torch.randn(9)[1:]
        for x, y in ((odd, aligned), (aligned, odd), (aligned, 2 * aligned)):
            assert torch.equal(add(x, y), x + y)
        assert not replays  # the first call was no example
        add = launcher()
        for x, y in ((aligned, 2 * aligned), (aligned, odd), (odd, aligned), (aligned, -aligned)):
            assert torch.equal(add(x, y), x + y)
        assert len(replays) == 1

    def test_other_metadata_is_another_call(replays: list[int]) -> None:
        add, x = launcher(), torch.randn(32)
        for given in (x[:12], x[:24:2], x.bfloat16()[:12], x[:8]):
            assert torch.equal(add(given, x[: len(given)]), given + x[: len(given)])
        assert not replays
        with hardware.pretend(hardware.Hardware("sm_90", 132, 227 << 10)):
            add(x[:12], x[:12] + 1.0)
        assert not replays
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            add(x[:12], x[:12] + 1.0)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        assert not replays

    def test_scratch_memory_is_torchs_and_the_users_allocator_stays(
        replays: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Triton asks at a launch; the user's allocator must be asked at the user's own."""
        from triton.runtime import _allocation

        asked: list[str] = []
        run = Compiled.__getitem__

        def asking(self: Compiled, grid: tuple[int, int, int]) -> Callable[..., None]:
            def launch(*args: Any) -> None:
                _allocation._allocator.get()(128, 64, None)
                run(self, grid)(*args)

            return launch

        monkeypatch.setattr(launching, "_compiled", {})
        monkeypatch.setattr(Compiled, "__getitem__", asking)
        monkeypatch.setattr(launching, "_scratch", lambda *size: asked.append("torch's"))
        monkeypatch.setattr(Compiled, "metadata", SimpleNamespace(global_scratch_size=128))
        monkeypatch.setattr(_allocation, "_allocator", ContextVar("allocator"))
        triton.set_allocator(lambda *size: asked.append("the user's"))
        x = torch.randn(8)
        launch(sum_kernel, (1,), x, x, torch.empty(8), 1, 8, BLOCK=16)
        launch(sum_kernel, (1,), x, x, torch.empty(8), 1, 8, BLOCK=16)
        assert asked == ["torch's"]  # by the second, which finds what the first has compiled
        add = launcher()
        for _ in range(2):
            x, y = torch.randn(2, 8)
            assert torch.equal(add(x, y), x + y)
        assert len(replays) == 1
        assert set(asked) == {"torch's"}
        assert len(asked) > 1
        _allocation._allocator.get()(128, 64, None)
        assert asked[-1] == "the user's"

    def test_an_error_leaves_nothing_behind(replays: list[int]) -> None:
        def fail(x: Tensor) -> Tensor:
            raise ZeroDivisionError

        x, y = torch.randn(2, 8)
        with pytest.raises(ZeroDivisionError):
            launcher(fail)(x, y)
        add = launcher()
        assert torch.equal(add(x, y), x + y)
        assert torch.equal(add(y, x), x + y)
        assert len(replays) == 1

else:

    @pytest.mark.beside([str(HERE)], 7 + len(OPS))
    def test_interpreted(beside: list[str]) -> None:
        assert beside
