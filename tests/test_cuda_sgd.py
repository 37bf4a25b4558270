"""Rung 5 of the ladder: SGD's CUDA C++ kernel on the CPU model, held against float64 by the rule of
bigops/check.py, with no finding of the race build's detectors.
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
SOURCE = Path(__file__).with_name("cuda") / "sgd.cu"
SGD = ops.table()["sgd"]

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))


class SgdOptions(ctypes.Structure):
    """bigops::SgdOptions of csrc/sgd_rule.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        *((name, ctypes.c_bool) for name in ("nesterov", "maximize", "is_first_step")),
        ("max_grad_norm", ctypes.c_double),
    )


@functools.wraps(SGD.function)
def modelled(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], **options: Any
) -> None:
    """bigops.ops.sgd.sgd on the model; float64, which is only the reference's, as it is.

    lr_on_device: the learning rate is where the kernel reads it.
    """
    lr_on_device = options.pop("lr_on_device", False)
    how = {name: options.pop(name) for name in ("order", "workers", "build") if name in options}
    lists = (params, grads, momentum_buffers)
    if any(p.dtype == torch.float64 for p in params):
        return SGD.function(*lists, **options)
    copies = options.pop("low_precision_params", None)
    total_norm, grad_scale, found_inf = (
        options.pop(name, None) for name in ("total_norm", "grad_scale", "found_inf")
    )
    given = {"lr": 1e-3} | options
    if given.get("max_grad_norm") is None:
        given["max_grad_norm"] = float("inf")
    elif total_norm is None:
        total_norm = torch.nn.utils.get_total_norm([g.double() for g in grads]).float()
    lr = torch.tensor(given.pop("lr"), dtype=torch.float64) if lr_on_device else None
    found = simt.compile(SOURCE, how.pop("build", "race")).call(
        "step",
        *(list(tensors) or None for tensors in lists),
        len(params),
        SgdOptions(**given),
        total_norm,
        grad_scale,
        found_inf,
        lr,
        copies or None,
        **how,
    )
    assert not found, found
    return None


# Of tensors that lie alike and of one dtype, which is what the launcher takes.
SAMPLES = [
    s
    for s in SGD.samples
    if not s.bench and not any(word in s.name for word in ("strides differ", "buffers"))
]
# Copies are of float32.
PAIRS = [(s, d) for s in SAMPLES for d in (DTYPES if "copies" not in s.name else DTYPES[:1])]


@pytest.mark.parametrize(("sample", "dtype"), PAIRS, ids=lambda x: getattr(x, "name", str(x)))
def test_truth(sample: ops.Sample, dtype: torch.dtype) -> None:
    compared = check.check_sample(replace(SGD, function=modelled), sample, None, dtype)
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
    return tuple([make(s, dtype) for s in shapes] for _ in range(3))


def aligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "maximize": True},
    "scaled and clipped": {
        "momentum": 0.5,
        "grad_scale": torch.tensor(64.0),
        "total_norm": torch.tensor(96.0),
        "max_grad_norm": 1.0,
        "found_inf": torch.zeros(()),
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [aligned, unaligned], ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], make: Callable[..., Tensor], dtype: torch.dtype) -> None:
    lists = call(dtype, make)
    compared = check.check_sample(
        replace(SGD, function=modelled),
        ops.Sample("", lambda device, dtype: (lists, {"lr": 0.1, **options})),
        None,
        dtype,
    )
    assert compared
    assert all(c.ok for c in compared), compared


@pytest.mark.parametrize("make", [aligned, unaligned], ids=lambda make: make.__name__)
def test_the_first_step_does_not_read_buffers(make: Callable[..., Tensor]) -> None:
    params, grads, buffers = call(torch.float32, make)
    for buffer in buffers:
        buffer.fill_(float("nan"))
    wanted = [p - 0.5 * g for p, g in zip(params, grads, strict=True)]
    modelled(params, grads, buffers, lr=0.5, momentum=0.9, dampening=0.7, is_first_step=True)
    torch.testing.assert_close(params, wanted)
    assert all(map(torch.equal, buffers, grads))


@pytest.mark.parametrize("copies", DTYPES[1:], ids=str)
def test_copies_are_parameters_rounded(copies: torch.dtype) -> None:
    """Wherever they lie; where the step is skipped they stay as they were."""
    for offset in (0, 1, 4):
        lists = call(torch.float32, aligned)
        low = [torch.empty(offset + p.numel(), dtype=copies)[offset:] for p in lists[0]]
        low = [copy.view(p.shape).fill_(-7.0) for copy, p in zip(low, lists[0], strict=True)]
        modelled(*lists, momentum=0.9, low_precision_params=low, found_inf=torch.ones(()))
        assert all((copy == -7.0).all() for copy in low)
        modelled(*lists, momentum=0.9, low_precision_params=low)
        assert all(map(torch.equal, low, [p.to(copies) for p in lists[0]]))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_learning_rate_on_the_device(found: float) -> None:
    """The bits of a step with it on the host; where the step is skipped nothing is written."""
    lists = call(torch.float32)
    before, wanted = ([[t.clone() for t in tensors] for tensors in lists] for _ in range(2))
    how: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.5}
    modelled(*lists, found_inf=torch.tensor(found), lr_on_device=True, **how)
    modelled(*wanted, **how)
    for tensors, others in zip(lists, before if found else wanted, strict=True):
        assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_more_tensors_than_kernel_arguments_hold(momentum: float) -> None:
    """Launches share them; numbers of chunks go on where the last one ended."""
    shapes = [(1 + i % 3,) for i in range(2500)]
    lists = call(torch.float32, aligned, shapes)
    wanted = [[t.clone() for t in tensors] for tensors in lists]
    modelled(*lists, momentum=momentum, build="plain")
    SGD.function(*wanted, momentum=momentum)
    for tensors, others in zip(lists, wanted, strict=True):
        torch.testing.assert_close(tensors, others)


def test_the_same_bits_in_every_order_and_build() -> None:
    lists = call(torch.bfloat16, aligned, ((70001,), (3, 9)))
    results = []
    for order, workers, build in (
        ("forward", 0, "race"),
        ("shuffled", 2, "race"),
        ("reverse", 2, "plain"),
        ("forward", 1, "address"),
    ):
        copies = [[t.clone() for t in tensors] for tensors in lists]
        modelled(*copies, momentum=0.9, order=order, workers=workers, build=build)
        results.append([t for tensors in copies for t in tensors])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
