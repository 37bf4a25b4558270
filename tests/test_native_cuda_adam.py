"""Adam's CUDA C++ kernels behind use_backend('native'): without a GPU the road to them; on one the
truth, streams and graphs: `pytest -m gpu tests/test_native_cuda_adam.py`.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native_cuda import _on_hopper, built  # noqa: F401
from torch import Tensor

import bigops
from bigops import check
from bigops.backends import cuda, native
from bigops.ledger import nvcc
from bigops.ops import Sample, adam_cuda, get

ADAM, GRAD_NORM = get("adam"), get("grad_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One under, at and one over: what 16 bytes hold, a block's chunk of a step (2048 of float32, 4096
# of 16 bits), and of the norm (8192, 16384).
BORDERS = [n + d for n in (4, 8, 2048, 4096, 8192, 16384) for d in (-1, 0, 1)]

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not())),
]


def on_gpu(test: Any) -> Any:
    return functools.reduce(lambda decorated, mark: mark(decorated), gpu, test)


# ---- the road


@pytest.mark.usefixtures("_on_hopper")
def test_unproven_kernels_serve_only_where_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.zeros(3)]
    assert "unproven on sm_90" in str(adam_cuda.why_not("adam", params))
    with bigops.use_backend("native"):
        assert adam_cuda.why_not("adam", params) is None
        assert "float64" in str(adam_cuda.why_not("adam", [*params, params[0].double()]))
        monkeypatch.setattr(cuda, "_capability", lambda index: (7, 5))
        assert "before sm_80" in str(adam_cuda.why_not("adam", params))


class OnCpu:
    """The bindings' face over the CPU's kernels, refusing what they refuse."""

    def __init__(self) -> None:
        self.calls = 0

    def adam_workspace(self, tensors: int) -> int:
        return 12 * tensors

    def grad_norm_workspace(self, tensors: int, numel: int) -> int:
        return 8 * (numel + tensors)

    def adam(self, *args: Any) -> list[int]:
        self.calls += 1
        lists, copies, steps = list(args[:5]), args[5], args[6]
        lr, beta1, beta2, eps, decay, decoupled, amsgrad, maximize, clip = args[7:16]
        norm, scale, found_inf, workspace = args[16:]
        assert (workspace is not None) == isinstance(lr, Tensor)
        written = (*lists, copies or [])
        odd = {i for ts in written for i, t in enumerate(ts) if not t.is_contiguous()}
        if odd or (found_inf is not None and found_inf.item()):
            return sorted(odd)
        numbers = (float(lr), beta1, beta2, eps, decay, decoupled, amsgrad, maximize, clip)
        native.kernels.adam(*lists, steps, None, None, None, *numbers, norm, scale, None)
        for copy, param in zip(copies or (), lists[0], strict=False):
            copy.copy_(param)
        return []

    def grad_norm(self, grads: list[Tensor], out: Tensor, workspace: Tensor) -> list[int]:
        odd = [i for i, grad in enumerate(grads) if not grad.is_contiguous()]
        if not odd:
            native.kernels.grad_norm(grads, out)
        return odd


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> OnCpu:
    found = OnCpu()
    monkeypatch.setattr(cuda, "kernels", lambda: found)
    return found


def lists(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    def draw() -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    params, grads, exp_avgs = draw(), draw(), draw()
    squares = [t.square() for t in draw()]
    return params, grads, exp_avgs, squares, [], [torch.tensor(3.0) for _ in shapes]


def copied(call: Any) -> Any:
    return tuple([t.clone() for t in tensors] for tensors in call)


def equal(call: Any, other: Any) -> bool:
    return all(all(map(torch.equal, a, b)) for a, b in zip(call, other, strict=True))


needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@needs_native
def test_tensors_that_do_not_lie_alike_are_copied_and_copied_back(kernels: OnCpu) -> None:
    ours = lists([(3, 4), (5,), (6, 7)])
    ours[1][2] = ours[1][2].t().contiguous().t()  # its gradient alone
    ours[2][0] = ours[2][0].t().contiguous().t()  # a state, which is written
    wanted = copied(ours)
    bigops.ops.adam.adam(*wanted)
    norm = adam_cuda.grad_norm(ours[1])
    adam_cuda.adam(*ours, _options())
    assert kernels.calls == 2
    assert not ours[2][0].is_contiguous()
    assert equal(ours, wanted)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in ours[1]]).norm())


def _options(**given: Any) -> Any:
    defaults: dict[str, Any] = dict.fromkeys(adam_cuda.Options._fields)
    defaults |= {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    defaults |= dict.fromkeys(("amsgrad", "maximize", "decoupled_weight_decay"), False)
    return adam_cuda.Options(**(defaults | given))


@needs_native
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.half)])
def test_copies(dtypes: Any, found: float | None, kernels: OnCpu) -> None:
    """By the kernel or after it, wherever they lie; not where the step is skipped."""
    ours = lists([(3, 4), (5,)], dtypes[0])
    copies = [torch.full((4, 3), 7.0, dtype=dtypes[1]).t(), torch.full((5,), 7.0, dtype=dtypes[1])]
    given = {} if found is None else {"found_inf": torch.tensor(found)}
    adam_cuda.adam(*ours, _options(low_precision_params=copies, **given))
    assert kernels.calls == (0 if found else 2 if dtypes[0] == torch.float32 else 1)
    wanted = copies if found else [param.to(dtypes[1]) for param in ours[0]]
    assert all(map(torch.equal, copies, wanted))
    assert all((copy == 7.0).all() == bool(found) for copy in copies)


@needs_native
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_counts_on_the_cpu_wait_for_found_inf(found: float, kernels: OnCpu) -> None:
    ours = lists([(3,)])
    before = copied(ours)
    adam_cuda.adam(*ours, _options(found_inf=torch.tensor(found)))
    assert kernels.calls == (0 if found else 1)
    assert equal(ours, before) == bool(found)


@needs_native
@pytest.mark.usefixtures("kernels")
def test_what_is_wrong_is_named() -> None:
    ours = lists([(3,), (4,)])
    ours[1][1] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"grads\[1\] must have params\[1\]'s shape"):
        adam_cuda.adam(*ours, _options())
    with pytest.raises(TypeError, match=r"grads\[1\] must be a torch.Tensor"):
        adam_cuda.grad_norm([torch.zeros(1), 3])  # type: ignore[list-item]


ERRORS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("bigops._native_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
t, step, turned = torch.zeros(2, 3), torch.tensor(1.0), torch.zeros(3, 2).t()
numbers = (0.9, 0.999, 1e-8, 0.0, False, False, False, None, None, None, None)
def show(params, grads, averages, steps, lr=0.1, copies=None):
    try:
        lists = params, grads, averages, averages, []
        print(module.adam(*lists, copies, steps, lr, *numbers, None))
    except Exception as error:
        print(type(error).__name__, error)
show([t], [t], [t], [step])
show([t], [t], [t], [])
show([t], [t[:1]], [t], [step])
show([t], [t], [t[:1].expand(2, 3)], [step])
show([t, t], [t, turned], [t, t], [step, step])
show([t], [t], [t], [step.long()])
show([t], [t], [t], [step], torch.tensor(0.1))
show([t.double()], [t.double()], [t.double()], [step])
show([t], [t], [t], [step], copies=[])
show([t], [t], [t], [step], copies=[t[:1].bfloat16()])
show([t], [t], [t], [step], copies=[turned.bfloat16()])
show([t], [t], [t], [step], copies=[t.double()])
"""
SAID = [
    "ValueError tensors must be on a CUDA device",
    "ValueError lists differ in length",
    "ValueError tensors of one parameter differ in shape or dtype",
    "ValueError an expanded tensor cannot be written",
    "[1]",
    "ValueError a number is not one float32 or float64",
    "ValueError adam needs a workspace for steps or lr on the device",
    "ValueError a tensor is not of float32, bfloat16 or float16",
    "ValueError lists differ in length",
    "ValueError tensors of one parameter differ in shape or dtype",
    "[0]",
    "ValueError copies are of float32, in bfloat16 or float16",
]


@pytest.mark.slow
@pytest.mark.skipif(nvcc.nvcc_version() is None, reason="nvcc is not installed")
def test_bindings_check_before_anything_is_launched(built: Path) -> None:  # noqa: F811
    command = [sys.executable, "-c", ERRORS, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == SAID


# ---- on a GPU


def judged(dtype: torch.dtype, call: Any, **options: Any) -> None:
    sample = Sample("", lambda device, dtype: (call, options))
    found = check.check_sample(ADAM, sample, "native", dtype, "cuda")
    assert found
    assert all(c.ok for c in found), [c for c in found if not c.ok]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", ADAM.samples, ids=lambda sample: sample.name)
def test_truth(sample: Sample, dtype: torch.dtype) -> None:
    found = check.check_sample(ADAM, sample, "native", dtype, "cuda")
    assert all(c.ok for c in found), [c for c in found if not c.ok]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"max_grad_norm": 1.0}], ids=str)
def test_borders(options: dict[str, Any], dtype: torch.dtype) -> None:
    call = lists([(n,) for n in BORDERS], dtype, "cuda")
    if options.get("amsgrad"):
        call[4].extend(2 * t for t in call[3])
    judged(dtype, call, **options)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(dtype: torch.dtype) -> None:
    call = lists([(n,) for n in BORDERS], dtype, "cuda")
    for tensors in call[:4]:
        tensors[:] = [torch.cat((t[:1], t))[1:] for t in tensors]
    assert call[0][0].data_ptr() % 16 == dtype.itemsize
    judged(dtype, call, max_grad_norm=1.0)


@on_gpu
@pytest.mark.parametrize("copies", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_over_all_borders(dtype: torch.dtype, copies: torch.dtype) -> None:
    call = lists([(n,) for n in BORDERS], dtype, "cuda")
    judged(dtype, call, low_precision_params=[p.to(copies) for p in call[0]])
    low = [torch.cat((p[:1], p)).to(copies)[1:] for p in call[0]]
    with bigops.use_backend("native"):
        bigops.ops.adam.adam(*call, low_precision_params=low, found_inf=scalars(1.0)["found_inf"])
        assert all(map(torch.equal, low, [p.to(copies) for p in copied(call)[0]]))
        bigops.ops.adam.adam(*call, low_precision_params=low)
    assert all(map(torch.equal, low, [p.to(copies) for p in call[0]]))


@on_gpu
def test_more_tensors_than_kernel_arguments_hold() -> None:
    judged(
        torch.float32, lists([(1 + i % 70,) for i in range(3000)], device="cuda"), max_grad_norm=1.0
    )


@on_gpu
def test_mixed_dtypes() -> None:
    parts = [lists([(2049,), (5,)], dtype, "cuda") for dtype in DTYPES]
    call = tuple([t for part in parts for t in part[role]] for role in range(6))
    judged(torch.float32, call, max_grad_norm=1.0)


def scalars(found: float) -> dict[str, Any]:
    numbers = {"grad_scale": 64.0, "total_norm": 96.0, "found_inf": found}
    return {name: torch.tensor(x, device="cuda") for name, x in numbers.items()}


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_and_clipped(dtype: torch.dtype) -> None:
    judged(dtype, lists([(8209,), (5, 7)], dtype, "cuda"), max_grad_norm=1.0, **scalars(0.0))


@on_gpu
@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64], ids=str)
def test_counts_and_learning_rate_on_the_device(step_dtype: torch.dtype, found: float) -> None:
    """The bits of a step with both on the host, without waiting; a skipped step is not counted."""
    ours = lists([(9000,), (5,)], device="cuda")
    ours[5][:] = [torch.tensor(float(i), dtype=step_dtype, device="cuda") for i in range(2)]
    theirs, before = copied(ours), copied(ours)
    theirs[5][:] = [t.cpu() for t in theirs[5]]
    how: dict[str, Any] = {
        "decoupled_weight_decay": True,
        "weight_decay": 0.5,
        "max_grad_norm": 1.0,
    }
    lr, given = torch.tensor(0.25, device="cuda"), scalars(found)
    with bigops.use_backend("native"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            bigops.ops.adam.adam(*ours, lr=lr, **how, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        bigops.ops.adam.adam(*theirs, lr=0.25, **how, **given)
    if found:
        assert equal(ours, before)
        return
    assert equal(ours[:4], theirs[:4])
    assert [t.item() for t in ours[5]] == [t.item() for t in theirs[5]] == [1.0, 2.0]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    first = lists([(1_000_003,), (3, 9), (70_001,)], dtype, "cuda")
    results = []
    for _ in range(5):
        call = copied(first)
        with bigops.use_backend("native"):
            bigops.ops.adam.adam(*call, max_grad_norm=0.1)
        results.append(call)
    assert all(equal(result, results[0]) for result in results)
    assert not equal(results[0][:1], first[:1])


@on_gpu
def test_the_norm() -> None:
    """Of mixed dtypes, over all borders, unaligned and in pieces; and of nothing."""
    grads = [torch.randn(n, device="cuda").to(d) for d in DTYPES for n in BORDERS]
    grads += [torch.randn(9000, device="cuda")[1:], torch.randn(90, 90, device="cuda")[::2, ::3]]
    want = torch.cat([grad.double().flatten() for grad in grads]).norm().item()
    with bigops.use_backend("native"):
        norms = [bigops.ops.adam.grad_norm(grads) for _ in range(5)]
        nothing = bigops.ops.adam.grad_norm([torch.randn(0, device="cuda")])
    assert len({norm.item() for norm in norms}) == 1
    assert abs(norms[0].item() - want) <= 4 * check.ulp(want, torch.float32)
    assert nothing.item() == 0.0


def trained(steps: int, graphed: bool) -> list[Tensor]:
    """Parameters and states after steps whose gradients come anew each time, eagerly or by one
    graph, with other steps between its replays; the learning rate changes on the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(4097,), (33, 65), (3,)] * 30  # more than the short table holds
    params = [torch.nn.Parameter(torch.ones(shape, device="cuda")) for shape in shapes]
    lr = torch.tensor(0.1, device="cuda")
    optimizer = bigops.optim.AdamW(params, lr=lr, capturable=True, max_grad_norm=1.0)
    other = bigops.optim.AdamW([torch.nn.Parameter(torch.ones(99, device="cuda"))])
    static = [torch.zeros_like(param) for param in params]
    graph = torch.cuda.CUDAGraph()
    for step in range(steps):
        drawn = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
        lr.fill_(0.1 / (1 + step))
        if not graphed or step == 0:
            for param, grad in zip(params, drawn, strict=True):
                param.grad = grad
            optimizer.step()
            continue
        for param, grad in zip(params, static, strict=True):
            param.grad = grad
        if step == 1:  # recorded, not run
            with torch.cuda.graph(graph):
                optimizer.step()
        for param in params:
            param.grad = None
        torch._foreach_copy_(static, drawn)
        other.param_groups[0]["params"][0].grad = torch.randn(99, device="cuda")
        other.step()
        graph.replay()
    states = [optimizer.state[p] for p in params]
    return [p.detach() for p in params] + [
        state[name] for name in ("exp_avg", "exp_avg_sq", "step") for state in states
    ]


@on_gpu
def test_a_captured_step_is_the_eager_one() -> None:
    with bigops.use_backend("native"):
        eager, replayed = trained(6, False), trained(6, True)
    assert eager[-1].item() == 6.0
    assert all(map(torch.equal, eager, replayed))


@on_gpu
def test_a_graph_that_would_repeat_one_step_is_refused() -> None:
    call = lists([(3,)], device="cuda")
    before = copied(call)
    graph, out = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with bigops.use_backend("native"), torch.cuda.graph(graph):
        out += 1
        with pytest.raises(RuntimeError, match="capturable=True"):
            bigops.ops.adam.adam(*call)
    graph.replay()
    assert equal(call, before)


@on_gpu
def test_a_side_stream() -> None:
    """The step waits for gradients that its own stream still writes, and the norm as well."""
    ours = lists([(100_000,), (5,)], device="cuda")
    theirs, late = copied(ours), copied(ours)[1]
    side = torch.cuda.Stream()
    with bigops.use_backend("native"):
        bigops.ops.adam.adam(*theirs, max_grad_norm=1.0)
        for grad in ours[1]:
            grad.zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            torch._foreach_copy_(ours[1], late)
            bigops.ops.adam.adam(*ours, max_grad_norm=1.0)
        torch.cuda.current_stream().wait_stream(side)
    assert equal(ours, theirs)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one() -> None:
    ours = lists([(5000,)], device="cuda:1")
    theirs = copied(ours)
    with bigops.use_backend("native"):
        bigops.ops.adam.adam(*ours, max_grad_norm=1.0)
        with torch.cuda.device(1):
            bigops.ops.adam.adam(*theirs, max_grad_norm=1.0)
    assert equal(ours, theirs)
    assert torch.cuda.current_device() == 0
