"""Rung 7: every op on every backend that a GPU has, by the error rule: `pytest -m gpu`.

What can be tried on a CPU is tried there too, on the native kernels, in every run: it shows that
the tests themselves hold before the first GPU meets them. Far strides, memory and TF32 are in
test_gpu_limits.py, optimizers and models in test_gpu_training.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from gpu_places import ANY, MARKS, Place, anywhere, gpu_only
from torch import Tensor
from torch.library import opcheck
from torch.utils import _pytree as pytree

import bigops
from bigops import check
from bigops.ops import Op, Sample

OPS = list(bigops.ops.table().values())

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_torch_op = pytest.mark.parametrize(
    "op", [op for op in OPS if op.schema is not None], ids=lambda op: op.name
)


def cases(*args: Any, **kwargs: Any) -> list[Any]:
    return [
        pytest.param(case, marks=MARKS, id=f"{case[0].name}-{case[2]}-{case[3]}-{case[1].name}")
        for case in check.cases(OPS, ANY, *args, **kwargs)
    ]


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    """cuDNN may use TF32 for fp32 unless told otherwise, and where it does is its secret."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def _repeatable(nan_memory: None) -> None:
    """torch's deterministic mode: CUDA C++ may otherwise add a gradient up as its parts arrive."""


def judge(case: tuple[Op, Sample, str, torch.dtype], device: str) -> None:
    op, sample, backend, dtype = case
    reason = check.serves(op, sample, backend, dtype, device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    wrong = [c for c in check.check_sample(op, sample, backend, dtype, device) if not c.ok]
    assert not wrong


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("case", cases())
def test_truth(case: Any) -> None:
    judge(case, "cuda")


@pytest.mark.parametrize("case", cases([torch.bfloat16, torch.float32], bench=True))
def test_truth_at_realistic_sizes(case: Any) -> None:
    judge(case, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a single GPU, or none")
@pytest.mark.parametrize("case", cases([torch.float32]))
def test_truth_on_a_device_that_is_not_the_current_one(case: Any) -> None:
    with torch.cuda.device(0):
        judge(case, "cuda:1")


# ---- what follows runs ops on samples, and compares runs of one and the same kernel bit for bit


def served(
    op: Op, place: Place, dtype: torch.dtype | None = None
) -> list[tuple[Sample, torch.dtype]]:
    """The op's small samples that the backend takes, in `dtype` or else the first that it takes;
    skips the test when there is none."""
    device, backend = place
    for kind in [dtype] if dtype else [torch.float32, torch.bfloat16]:
        small = [s for s in op.samples if not s.bench and (not s.dtypes or kind in s.dtypes)]
        found = [s for s in small if check.serves(op, s, backend, kind, device) is None]
        if found:
            return [(sample, kind) for sample in found]
    pytest.skip(f"{op.name} has no {backend} kernels for {device} and {dtype or 'any dtype'}")


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def gradient_for(root: Tensor) -> Tensor:
    """The same at every call, and no two neighbours alike; made on the device."""
    return torch.arange(root.numel(), device=root.device).cos().view(root.shape).to(root.dtype)


def results(op: Op, backend: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Outputs and gradients; of an op that updates its arguments, what it has made of copies."""
    if op.mutates:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    with bigops.use_backend(backend):
        found = tensors(op.function(*args, **kwargs))
        if op.mutates:
            return [*found, *tensors((args, kwargs))]
        roots = [t for t in found if t.requires_grad]
        leaves = [t for t in tensors((args, kwargs)) if t.requires_grad]
        if roots:
            seeds = [gradient_for(root) for root in roots]
            grads = torch.autograd.grad(roots, leaves, seeds, allow_unused=True)
            found += [grad for grad in grads if grad is not None]
    return [t.detach() for t in found]


def repeated(op: Op, backend: str, args: Any, kwargs: Any) -> list[Tensor]:
    """`results` with the random numbers of every other call of it."""
    torch.manual_seed(0)
    return results(op, backend, args, kwargs)


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def op_arguments(op: Op, sample: Sample, dtype: torch.dtype, place: Place) -> tuple[Any, ...]:
    """The torch op's arguments for a sample."""
    device, backend = place
    caught: list[tuple[Any, ...]] = []
    call = op.call

    def catch(*args: Any) -> Any:
        caught.append(args)
        return call(*args)

    op.routes.clear()  # a route does not ask for op.call
    op.call = catch
    try:
        args, kwargs = sample.make(device, dtype)
        with bigops.use_backend(backend):
            op.function(*args, **kwargs)
    finally:
        op.call = call
    return tuple(
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in caught[0]
    )


@gpu_only()
@each_torch_op
def test_opcheck(op: Op, place: Place) -> None:
    overload = getattr(torch.ops.bigops, op.name).default
    for sample, dtype in served(op, place)[:3]:
        args = op_arguments(op, sample, dtype, place)
        with bigops.use_backend(place[1]):
            opcheck(overload, args)


@pytest.mark.usefixtures("_repeatable")
@gpu_only()
@each_torch_op
def test_compiled_with_inductor(op: Op, place: Place) -> None:
    device, backend = place
    sample, dtype = served(op, place)[0]
    args, kwargs = sample.make(device, dtype)
    compiled = torch.compile(op.function, fullgraph=True)
    leaves = [t for t in tensors((args, kwargs)) if t.requires_grad]
    found = []
    with bigops.use_backend(backend):
        for function in (compiled, op.function):
            torch.manual_seed(0)
            out = tensors(function(*args, **kwargs))[0]
            grads = torch.autograd.grad(out, leaves, gradient_for(out)) if leaves else ()
            found.append([out, *grads])
    assert_equal(*found)


@pytest.mark.usefixtures("_repeatable")
@anywhere()
@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_bits_in_every_run(op: Op, place: Place, dtype: torch.dtype) -> None:
    device, backend = place
    for sample, _ in served(op, place, dtype)[-6:]:
        args, kwargs = sample.make(device, dtype)
        first, *others = [repeated(op, backend, args, kwargs) for _ in range(3)]
        for other in others:
            if first:  # adam of nothing
                assert_equal(other, first)


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of `run`, and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiled, loaded and allocated beforehand
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = run()
    return graph, written


# Not Adam and its norm: their tables of addresses come from the host at every call.
@pytest.mark.usefixtures("_repeatable")
@gpu_only()
@each_torch_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_replays_what_a_launch_computes(op: Op, place: Place, dtype: torch.dtype) -> None:
    device, backend = place
    for sample, _ in served(op, place, dtype)[-6:]:
        call = sample.make(device, dtype)
        graph, written = captured(lambda call=call: results(op, backend, *call))
        with torch.no_grad():
            for old, new in zip(tensors(call), tensors(sample.make(device, dtype)), strict=True):
                old.copy_(new)
        expected = repeated(op, backend, *call)
        for t in written:
            t.fill_(float("nan") if t.is_floating_point() else 1)
        torch.manual_seed(0)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(written, expected)


@pytest.mark.usefixtures("_repeatable")
@gpu_only()
@each_op
def test_another_stream_orders_the_kernels(op: Op, place: Place) -> None:
    """Inputs arrive late on the side stream: a kernel on another one would read zeros."""
    device, backend = place
    side = torch.cuda.Stream()
    for sample, dtype in served(op, place)[-3:]:
        call = sample.make(device, dtype)
        expected = repeated(op, backend, *call)
        late = pytree.tree_map_only(
            Tensor, lambda t: torch.zeros_like(t).requires_grad_(t.requires_grad), call
        )
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # cycles: about ten milliseconds
            with torch.no_grad():
                for target, source in zip(tensors(late), tensors(call), strict=True):
                    target.copy_(source)
            got = repeated(op, backend, *late)
        side.synchronize()
        assert_equal(got, expected)


@gpu_only()
@each_op
def test_nothing_waits_for_the_device(op: Op, place: Place) -> None:
    device, backend = place
    for sample, dtype in served(op, place):
        call = sample.make(device, dtype)
        results(op, backend, *call)  # compiles, and uploads what is kept
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(op, backend, *call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
