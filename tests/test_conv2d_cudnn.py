"""conv2d_act's road on a GPU: the passes around cuDNN's convolution, interpreted here, around
torch's convolution of the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import check, ops
from bigops.ops import conv2d_cases as cases
from bigops.ops import conv2d_cudnn as cudnn
from bigops.ops.declare import Call
from bigops.ops.dispatch import decision
from bigops.reference.conv2d_act import ACTIVATIONS

pytest.importorskip("triton")
OP = ops.get("conv2d_act")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Not "same", whose odd padding comes before the op.
SAMPLES = [s for s in OP.samples if not s.bench and s.name != "same"]


def as_on_a_gpu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Eager there: cuDNN's output is rounded before the bias is added."""
    activation, residual = kwargs.pop("activation", "relu"), kwargs.pop("residual", None)
    out = torch.nn.functional.conv2d(input, weight, None, *args, **kwargs)
    out = out if bias is None else out + bias[:, None, None]
    out = out if residual is None else out + residual
    return out if activation in (None, "none") else ACTIVATIONS[activation](out)


def gradients(out: Tensor, call: Call, grad: Tensor) -> list[Tensor]:
    args, kwargs = call
    leaves = [t for t in (*args, kwargs.get("residual")) if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.skipif(not INTERPRETED, reason="in an interpreted process, by test_interpreted")
@pytest.mark.parametrize("dtype", cudnn.DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_passes_around_a_convolution(sample: ops.Sample, dtype: torch.dtype) -> None:
    args, kwargs = sample.make("cpu", dtype)
    _, call, _ = decision(OP.function, *args, **kwargs)
    assert cudnn.why_not(args[0]) is None
    given = tuple(t.detach() if isinstance(t, Tensor) else t for t in call)
    out, pre = cudnn.forward(*given)
    saved = pre if call[-2] in ("none", "gelu", "silu") else out
    needs = [t is not None and t.requires_grad for t in call[:4]]
    grad = torch.randn_like(out)
    grads = cudnn.backward(grad, *given[:2], saved, *call[4:-1], needs)
    got = [out, *(g for g in grads if g is not None)]
    eager = gradients(as_on_a_gpu(*args, **kwargs), (args, kwargs), grad)
    wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in args)
    options = dict(kwargs)
    if "residual" in options:
        options["residual"] = kwargs["residual"].detach().double().requires_grad_()
    exact = gradients(cases.act_eager(*wide, **options), (wide, options), grad.double())
    assert len(got) == sum(needs) + 1
    for i, (mine, other, right) in enumerate(zip(got, eager, exact, strict=True)):
        found = check.compare(str(i), mine, other.detach(), right.detach())
        assert found.ok, found
    shapes = OP.backward_fake(grad, *given[:2], needs)
    assert [g is None or g.stride() for g in grads] == [s is None or s.stride() for s in shapes]


@pytest.mark.skipif(INTERPRETED, reason="from outside")
@pytest.mark.beside(["-q", str(Path(__file__)), "-k", "passes"], 3 * len(SAMPLES))
def test_interpreted(beside: list[str]) -> None:
    """The session has passed."""
    assert beside
