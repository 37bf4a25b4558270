"""SGD's CUDA C++ kernel behind use_backend('native'): without a GPU the road to it; on one the
truth: `pytest -m gpu tests/test_native_cuda_sgd.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_native_cuda import _on_hopper  # noqa: F401, a fixture asked for by its name
from test_native_cuda_adam import copied, equal, needs_native, on_gpu
from torch import Tensor

import bigops
from bigops import check
from bigops.backends import cuda, native
from bigops.ops import Sample, get, sgd_cuda, step_cuda

SGD = get("sgd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.usefixtures("_on_hopper")
def test_it_is_unproven_and_serves_only_where_forced() -> None:
    params = [torch.zeros(3)]
    assert "unproven on sm_90" in str(step_cuda.why_not("sgd", params))
    with bigops.use_backend("native"):
        assert step_cuda.why_not("sgd", params) is None


class OnCpu:
    """The binding's face over the CPU's kernels, refusing what it refuses."""

    def __init__(self) -> None:
        self.calls = 0

    def sgd(self, *args: Any) -> list[int]:
        self.calls += 1
        *lists, copies, lr, momentum, dampening, decay, nesterov, maximize, first, clip = args[:12]
        norm, scale, found_inf = args[12:]
        written = (*lists, copies or [])
        odd = {i for ts in written for i, t in enumerate(ts) if not t.is_contiguous()}
        if odd or (found_inf is not None and found_inf.item()):
            return sorted(odd)
        numbers = (lr, momentum, dampening, decay, nesterov, maximize, first, clip)
        native.kernels.sgd(*lists, None, None, *numbers, norm, scale, None)
        for copy, param in zip(copies or (), lists[0], strict=False):
            copy.copy_(param)
        return []


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> OnCpu:
    found = OnCpu()
    monkeypatch.setattr(cuda, "kernels", lambda: found)
    return found


def lists(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params, grads, buffers = (
        [torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(3)
    )
    return params, grads, buffers


def options(**given: Any) -> Any:
    defaults: dict[str, Any] = dict.fromkeys(sgd_cuda.Options._fields)
    defaults |= {"lr": 1e-3, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    defaults |= dict.fromkeys(("nesterov", "maximize", "is_first_step"), False)
    return sgd_cuda.Options(**(defaults | given))


@needs_native
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tensors_that_do_not_lie_alike_are_copied_and_copied_back(
    momentum: float, kernels: OnCpu
) -> None:
    ours = lists([(3, 4), (5,), (6, 7)])
    ours[1][2] = ours[1][2].t().contiguous().t()  # its gradient alone
    ours[0][0] = ours[0][0].t().contiguous().t()
    wanted = copied(ours)
    how = {"momentum": momentum, "dampening": 0.5, "weight_decay": 0.1}
    bigops.ops.sgd.sgd(*wanted, **how)
    sgd_cuda.sgd(*ours, options(momentum=momentum))
    assert kernels.calls == 2
    assert not ours[0][0].is_contiguous()
    assert equal(ours, wanted)


@needs_native
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.half)])
def test_copies(dtypes: Any) -> None:
    """By the kernel or after it."""
    ours = lists([(3, 4), (5,)], dtypes[0])
    copies = [torch.empty(p.shape, dtype=dtypes[1]) for p in ours[0]]
    sgd_cuda.sgd(*ours, options(low_precision_params=copies))
    assert all(map(torch.equal, copies, [param.to(dtypes[1]) for param in ours[0]]))


@needs_native
@pytest.mark.usefixtures("kernels")
def test_what_is_wrong_is_named() -> None:
    ours = lists([(3,), (4,)])
    ours[1][1] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"grads\[1\] must have params\[1\]'s shape"):
        sgd_cuda.sgd(*ours, options())


# ---- on a GPU


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SGD.samples, ids=lambda sample: sample.name)
def test_truth(sample: Sample, dtype: torch.dtype) -> None:
    if (sample.dtypes and dtype not in sample.dtypes) or "buffers" in sample.name:
        pytest.skip("states of another dtype are Triton's or the reference's")
    compared = check.check_sample(SGD, sample, "native", dtype, device="cuda")
    assert all(c.ok for c in compared), [c for c in compared if not c.ok]


@on_gpu
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_scaled_clipped_and_with_its_rate_on_the_device(found: float) -> None:
    ours = lists([(70001,), (5,)], device="cuda")
    before, wanted = copied(ours), copied(ours)
    how: dict[str, Any] = {"momentum": 0.9, "max_grad_norm": 1.0}
    scale = torch.tensor(4.0, device="cuda")
    with bigops.use_backend("native"):
        bigops.ops.sgd.sgd(
            *ours,
            lr=torch.tensor(0.3, device="cuda"),
            grad_scale=scale,
            found_inf=torch.tensor(found, device="cuda"),
            **how,
        )
    with bigops.use_backend("reference"):
        bigops.ops.sgd.sgd(*wanted, lr=0.3, grad_scale=scale, **how)
    torch.testing.assert_close(ours, before if found else wanted)
