"""Rung 5 of the ladder: Adam's CUDA C++ kernels on the CPU model, held against float64 by the rule
of bigops/check.py, with no finding of the race build's detectors.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import check, ops, simt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOURCE = Path(__file__).with_name("cuda") / "adam.cu"
ADAM, GRAD_NORM = ops.table()["adam"], ops.table()["grad_norm"]

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))


class AdamOptions(ctypes.Structure):
    """bigops::AdamOptions of csrc/adam_rule.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_bool) for name in ("decoupled_weight_decay", "amsgrad", "maximize")),
        ("max_grad_norm", ctypes.c_double),
    )


def run(function: str, *args: Any, build: str = "race", **how: Any) -> None:
    found = simt.compile(SOURCE, build).call(function, *args, **how)
    assert not found, found


def workspaces(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of a step and of the norm, of just the size that is asked for, full of rubbish."""
    sizes = torch.zeros(2, dtype=torch.int64)
    numel = sum(t.numel() for t in tensors)
    run("workspaces", len(tensors), numel, sizes[:1], sizes[1:])
    step, norm = (torch.full((size,), 0xA5, dtype=torch.uint8) for size in sizes.tolist())
    return step, norm


def modelled_norm(grads: Sequence[Tensor], **how: Any) -> Tensor:
    out = torch.full((), float("nan"))
    run("norm", list(grads), len(grads), out, workspaces(grads)[1], **how)
    return out


@functools.wraps(ADAM.function)
def modelled(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    **options: Any,
) -> None:
    """bigops.ops.adam.adam on the model; float64, which is only the reference's, as it is.

    on_device: step counts and the learning rate are where the kernel reads and counts them.
    """
    on_device = options.pop("on_device", False)
    copies = options.pop("low_precision_params", None)
    how = {name: options.pop(name) for name in ("order", "workers", "build") if name in options}
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    if any(p.dtype == torch.float64 for p in params):
        return ADAM.function(*lists, **options, low_precision_params=copies)
    total_norm, grad_scale, found_inf = (
        options.pop(name, None) for name in ("total_norm", "grad_scale", "found_inf")
    )
    given = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8} | options
    if given.get("max_grad_norm") is None:
        given["max_grad_norm"] = float("inf")
    elif total_norm is None:
        total_norm = modelled_norm(grads, **how)
    counted, counts, lr, workspace = None, None, None, None
    if on_device:
        lr = torch.tensor(given.pop("lr"), dtype=torch.float64)
        counts, workspace = list(state_steps), workspaces(params)[0]
    else:
        for step in state_steps:
            step += 1
        counted = torch.tensor([step.item() for step in state_steps], dtype=torch.float64)
    run(
        "step",
        *(list(tensors) or None for tensors in lists[:5]),
        counted,
        counts,
        len(params),
        AdamOptions(**given),
        total_norm,
        grad_scale,
        found_inf,
        lr,
        copies or None,
        workspace,
        **how,
    )
    return None


# Of tensors that lie alike and of one dtype, which is what the launcher takes.
SAMPLES = [
    s
    for s in ADAM.samples
    if not s.bench and "strides differ" not in s.name and "averages" not in s.name
]
# Copies are of float32.
PAIRS = [(s, d) for s in SAMPLES for d in (DTYPES if "copies" not in s.name else DTYPES[:1])]


@pytest.mark.parametrize(("sample", "dtype"), PAIRS, ids=lambda x: getattr(x, "name", str(x)))
def test_truth(sample: ops.Sample, dtype: torch.dtype) -> None:
    compared = check.check_sample(replace(ADAM, function=modelled), sample, None, dtype)
    assert all(c.ok for c in compared), [c for c in compared if not c.ok]
    assert len(compared) >= 1 or sample.name == "nothing"


def unaligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Its address is a multiple of an element's size and of no more."""
    whole = torch.randn(torch.Size(shape).numel() + 1).to(dtype)
    return whole[1:].view(shape)


def call(
    dtype: torch.dtype,
    make: Callable[..., Tensor] = unaligned,
    shapes: Sequence[tuple[int, ...]] = ((8209,), (5, 7), (1,)),
) -> Any:
    params, grads, exp_avgs = ([make(s, dtype) for s in shapes] for _ in range(3))
    squares = [make(s, dtype).square_() for s in shapes]
    return params, grads, exp_avgs, squares, [], [torch.tensor(3.0) for _ in shapes]


def sample_of(lists: Any, **kwargs: Any) -> ops.Sample:
    return ops.Sample("", lambda device, dtype: (lists, kwargs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors_are_served_element_by_element(dtype: torch.dtype) -> None:
    lists = call(dtype)
    assert lists[0][0].data_ptr() % 16 == dtype.itemsize
    compared = check.check_sample(
        replace(ADAM, function=modelled), sample_of(lists, max_grad_norm=0.5), None, dtype
    )
    assert compared
    assert all(c.ok for c in compared), compared


@pytest.mark.parametrize("copies", DTYPES[1:], ids=str)
def test_copies_are_parameters_rounded(copies: torch.dtype) -> None:
    """Wherever they lie; where the step is skipped they stay as they were."""
    for offset in (0, 1, 4):
        lists = call(torch.float32, lambda shape, dtype: torch.randn(shape).to(dtype))
        low = [torch.empty(offset + p.numel(), dtype=copies)[offset:] for p in lists[0]]
        low = [copy.view(p.shape).fill_(-7.0) for copy, p in zip(low, lists[0], strict=True)]
        modelled(*lists, low_precision_params=low, found_inf=torch.ones(()))
        assert all((copy == -7.0).all() for copy in low)
        modelled(*lists, low_precision_params=low)
        assert all(map(torch.equal, low, [p.to(copies) for p in lists[0]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_gradients(dtype: torch.dtype) -> None:
    scale, total = torch.tensor(64.0), torch.tensor(96.0)
    how = {"grad_scale": scale, "max_grad_norm": 1.0, "total_norm": total}
    compared = check.check_sample(
        replace(ADAM, function=modelled),
        sample_of(call(dtype), found_inf=torch.zeros(()), **how),
        None,
        dtype,
    )
    assert compared
    assert all(c.ok for c in compared), compared


def test_found_inf_leaves_everything_as_it_was() -> None:
    lists = call(torch.float32)
    before = [[t.clone() for t in tensors] for tensors in lists[:5]]
    modelled(*lists, found_inf=torch.ones(()))
    for tensors, kept in zip(lists[:5], before, strict=True):
        assert all(map(torch.equal, tensors, kept))


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_counts_and_learning_rate_on_the_device(found: float, step_dtype: torch.dtype) -> None:
    """The bits of a step with both on the host; neither moves where the step is skipped."""
    lists = call(torch.float32)
    lists[5][:] = [torch.tensor(float(i), dtype=step_dtype) for i in range(len(lists[5]))]
    copies = [[t.clone() for t in tensors] for tensors in lists]
    before = [[t.clone() for t in tensors] for tensors in lists]
    how: dict[str, Any] = {"lr": 0.3, "decoupled_weight_decay": True, "weight_decay": 0.5}
    modelled(*lists, found_inf=torch.tensor(found), on_device=True, **how)
    if found:
        wanted = before
    else:
        modelled(*copies, **how)
        wanted = copies
        assert [step.item() for step in lists[5]] == [1.0, 2.0, 3.0]
    for tensors, others in zip(lists, wanted, strict=True):
        assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("on_device", [False, True])
def test_more_tensors_than_kernel_arguments_hold(on_device: bool) -> None:
    """Launches share them; counts and numbers of chunks go on where the last one ended."""
    shapes = [(1 + i % 3,) for i in range(1500)]
    lists = call(torch.float32, lambda shape, _: torch.randn(shape), shapes)
    lists[5][:] = [torch.tensor(float(i)) for i in range(1500)]
    function = functools.update_wrapper(
        functools.partial(modelled, on_device=on_device, build="plain"), ADAM.function
    )
    compared = check.check_sample(
        replace(ADAM, function=function), sample_of(lists, max_grad_norm=0.5), None, torch.float32
    )
    assert compared
    assert all(c.ok for c in compared), [c for c in compared if not c.ok]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    lists = call(dtype, lambda shape, dtype: torch.randn(shape).to(dtype), ((70001,), (3, 9)))
    results = []
    for order, workers in (("forward", 0), ("forward", 1), ("reverse", 2), ("shuffled", 2)):
        copies = [[t.clone() for t in tensors] for tensors in lists]
        modelled(*copies, max_grad_norm=0.1, order=order, workers=workers)
        results.append([t for tensors in copies for t in tensors])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("build", ["plain", "address"])
def test_other_builds(build: str) -> None:
    lists = call(torch.bfloat16)
    copies = [[t.clone() for t in tensors] for tensors in lists]
    modelled(*lists, max_grad_norm=0.1)
    modelled(*copies, max_grad_norm=0.1, build=build)
    for tensors, others in zip(lists, copies, strict=True):
        assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sample", [s for s in GRAD_NORM.samples if not s.bench], ids=lambda sample: sample.name
)
def test_truth_of_the_norm(sample: ops.Sample, dtype: torch.dtype) -> None:
    @functools.wraps(GRAD_NORM.function)
    def function(grads: list[Tensor]) -> Tensor:
        wide = any(g.dtype == torch.float64 for g in grads)
        return GRAD_NORM.function(grads) if wide else modelled_norm(grads)

    (compared,) = check.check_sample(replace(GRAD_NORM, function=function), sample, None, dtype)
    assert compared.ok, compared


def test_the_norm_of_mixed_dtypes_is_written_even_of_nothing() -> None:
    grads = [torch.randn(9000), torch.randn(77).bfloat16(), torch.randn(0), torch.randn(13).half()]
    wanted = torch.cat([g.double().flatten() for g in grads]).norm()
    assert abs(modelled_norm(grads).double() - wanted) <= 4 * check.ulp(
        wanted.item(), torch.float32
    )
    assert modelled_norm([torch.randn(0)]).item() == 0.0
    orders = ("forward", "reverse", "shuffled")
    assert len({modelled_norm(grads, order=order).item() for order in orders}) == 1
