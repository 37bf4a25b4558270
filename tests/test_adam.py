"""The op adam beyond its table samples: averages without a bias, bad tensors, the norm.

On native in this process, on Triton where it says so in an interpreted one; test_optim.py has the
optimizers, test_ops.py the truth over the samples.
"""

from __future__ import annotations

import copy
import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.utils._python_dispatch import TorchDispatchMode

import bigops
from bigops.backends import native
from bigops.ops.adam import adam, grad_norm
from bigops.ops.step import refuse_uncounted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
INTERPRETER = runpy.run_path(str(Path(__file__).with_name("interpreter.py")))


def second_average(dtype: torch.dtype, ours: bool) -> Tensor:
    """exp_avg_sq after ten steps, in double."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(11, 4096, generator=generator).to(dtype)
    lists = [[torch.zeros(4096, dtype=dtype)] for _ in range(2)]
    squares, count = [drawn[10] ** 2], [torch.tensor(5.0)]
    options = {"lr": 0.0, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    for grad in drawn[:10]:
        call = ([lists[0][0]], [grad], [lists[1][0]], squares, [], count)
        if ours:
            with bigops.use_backend(BACKEND):
                adam(*call, **options)
        else:
            torch_adam(*call, amsgrad=False, maximize=False, **options)
    return squares[0].double()


def test_beta2_is_not_rounded() -> None:
    """Rounding errors cancel over 4096 elements; what remains is 0.999's own, in every step."""
    exact = second_average(torch.float64, ours=False)
    bias, torchs = (
        ((second_average(torch.float32, ours) - exact) / exact).mean().abs().item()
        for ours in (True, False)
    )
    assert torchs == pytest.approx(10 * abs(torch.tensor(0.999).item() - 0.999), rel=0.1)
    assert bias < 0.1 * torchs


# What an interpreted process runs, of test_optim_states.py some of the many tests of one thing.
BY_TRITON = (
    "not_rounded",
    "after_right_calls",
    "infinite",
    "counted_on",
    "captured_step_reads",
    "codes_is_the and (float32-contiguous or bfloat16-channels_last or torch.float16-every)",
    "rounding_is_the and codes and (contiguous or channels_last or every)",
    "rounding_is_the and plain-adam and unaligned",
    "test_masters and (bfloat16-int8-AdamW or torch.float16-None-SGD)",
    "leaves_infinity",
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_interpreted() -> None:
    chosen = " or ".join(f"({words})" for words in BY_TRITON)
    states = str(Path(__file__).with_name("test_optim_states.py"))
    INTERPRETER["session"](__file__, states, "-k", chosen, at_least=22)


def test_wrong_lists_are_named_after_right_calls_too() -> None:
    """And new tensors that are like the old ones are updated, not those."""
    right = call()
    with bigops.use_backend(BACKEND):
        for _ in range(2):
            adam(**right)
        right["params"] = [torch.ones(3), torch.ones(2, 2).T]
        adam(**right)
        assert all((param < 1.0).all() for param in right["params"])
        right["max_exp_avg_sqs"] = [torch.ones(4), torch.ones(2, 2)]
        adam(**right)
        with pytest.raises(ValueError, match=r"max_exp_avg_sqs\[0\] must have params\[0\]'s shape"):
            adam(**right, amsgrad=True)
        right["grads"][1] = torch.ones(2, 2).bfloat16()
        with pytest.raises(ValueError, match=r"grads\[1\] must have params\[1\]'s dtype"):
            adam(**right)
        right["grads"][1] = torch.ones(2, 2)
        with pytest.raises(TypeError, match="eps"):
            adam(**right, eps="small")


def test_norm_of_numbers_whose_squares_overflow() -> None:
    assert grad_norm([torch.full((3,), 1e30), torch.full((13,), 1e30)]).item() == pytest.approx(
        4e30
    )


def call(**change: Any) -> dict[str, Any]:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    lists: dict[str, Any] = {name: [torch.ones(3), torch.ones(2, 2)] for name in names}
    return (
        lists | {"max_exp_avg_sqs": [], "state_steps": [torch.zeros(()) for _ in range(2)]} | change
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grads", {"grads": [torch.ones(3)]}),
        ("state_steps", {"state_steps": []}),
        (r"grads\[1\]", {"grads": [torch.ones(3), torch.ones(2, 2).half()]}),
        (r"grads\[0\]", {"grads": [torch.ones(4), torch.ones(2, 2)]}),
        (r"grads\[1\]", {"grads": [torch.ones(3), torch.ones(4)]}),
        (r"grads\[0\]", {"grads": [torch.ones(3).to_sparse(), torch.ones(2, 2)]}),
        (r"grads\[1\]", {"grads": [torch.ones(3), torch._neg_view(torch.ones(2, 2))]}),
        (r"exp_avgs\[0\]", {"exp_avgs": [torch.ones(3).double(), torch.ones(2, 2)]}),
        (r"exp_avg_sqs\[1\]", {"exp_avg_sqs": [torch.ones(3), torch.ones(1).expand(2, 2)]}),
        (r"params\[0\]", {"params": [torch.ones(1).expand(3), torch.ones(2, 2)]}),
        (r"params\[0\]", {"params": [torch.ones(3).int(), torch.ones(2, 2)]}),
        (r"params\[1\]", {"params": [torch.ones(3), torch.ones(2, 2, device="meta")]}),
        (r"state_steps\[0\]", {"state_steps": [torch.zeros(2), torch.zeros(())]}),
        (
            r"state_steps\[1\]",
            {"state_steps": [torch.zeros(()), torch.zeros((), dtype=torch.int64)]},
        ),
        ("max_exp_avg_sqs", {"amsgrad": True}),
    ],
)
def test_bad_tensors_are_named(name: str, change: dict[str, Any]) -> None:
    arguments = call(**change)
    before = copy.deepcopy([t for t in arguments["params"] if t.device.type == "cpu"])
    with pytest.raises(ValueError, match=rf"^{name} must"):
        adam(**arguments)
    for old, t in zip(before, arguments["params"], strict=False):
        assert torch.equal(old, t)
    with pytest.raises(TypeError, match=r"^params\[0\] must be a torch.Tensor, got list"):
        adam(**call(params=[[1.0], torch.ones(2, 2)]))


def test_a_subclass_of_tensor_runs_the_reference_and_says_so() -> None:
    class Tagged(Tensor):
        pass

    plain, lists = call(), call(params=[torch.ones(3).as_subclass(Tagged), torch.ones(2, 2)])
    with pytest.warns(bigops.FallbackWarning, match="tensors of type Tagged"):
        adam(**lists, lr=0.5, max_grad_norm=1.0)
    adam(**plain, lr=0.5, max_grad_norm=1.0)
    for name in ("params", "exp_avgs", "state_steps"):
        torch.testing.assert_close([t.as_subclass(Tensor) for t in lists[name]], plain[name])


class Names(TorchDispatchMode):
    """The ATen ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def counted_call(steps: list[Tensor]) -> dict[str, Any]:
    """Of as many tensors."""
    generator = torch.Generator().manual_seed(0)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    lists: dict[str, Any] = {
        name: [torch.rand(700 * i, generator=generator) for i in range(len(steps))]
        for name in names
    }
    return lists | {"max_exp_avg_sqs": [], "state_steps": steps, "weight_decay": 0.1}


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton: test_interpreted runs it")
@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decay"])
def test_steps_are_counted_on_the_device(decoupled: bool) -> None:
    """As on the CPU, and nothing there waits for a number."""

    def steps() -> list[Tensor]:
        counts, dtypes = (0.0, 1.0, 9.0, 1e6), (torch.float32, torch.float64)
        return [torch.tensor(count, dtype=dtype) for dtype in dtypes for count in counts]

    here, there = counted_call(steps()), counted_call(steps())
    rest: dict[str, Any] = {"beta1": 0.0 if decoupled else 0.9, "max_grad_norm": 1.0}
    rest["decoupled_weight_decay"] = decoupled
    lr, skip = torch.tensor(0.25), torch.zeros(())
    with bigops.use_backend("triton"):
        for _ in range(2):
            adam(**here, **rest, lr=0.25)
            with Names() as names:
                adam(**there, **rest, lr=lr, found_inf=skip)
            assert "_local_scalar_dense" not in names.seen
        for name in ("params", "exp_avgs", "exp_avg_sqs", "state_steps"):
            torch.testing.assert_close(there[name], here[name], rtol=1e-6, atol=0)
        before = copy.deepcopy(there)
        adam(**there, **rest, lr=lr, found_inf=skip + 1)
        for name, found in before.items():
            assert not isinstance(found, list) or all(map(torch.equal, found, there[name]))


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's table: test_interpreted runs it")
def test_what_a_captured_step_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of every launch, in memory that a graph may copy from; none serves another call."""
    from bigops.kernels import step_table

    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    calls = [counted_call([torch.zeros(()) for _ in range(3)]) for _ in range(2)]
    with bigops.use_backend("triton"):
        adam(**calls[0], lr=torch.tensor(0.25))
        plans = dict(step_table._plans)
        kept: list[Any] = []
        monkeypatch.setattr(step_table, "_captured", kept)
        monkeypatch.setattr(step_table, "capturing", lambda device: True)
        monkeypatch.setattr(Tensor, "pin_memory", pin)
        adam(**calls[1], lr=torch.tensor(0.25))
        (plan, table) = kept
        assert plan in plans.values()
        assert table is pinned[0]
        assert table[:3, 0].tolist() == [param.data_ptr() for param in calls[1]["params"]]
        adam(**counted_call([torch.zeros(()) for _ in range(7)]), lr=torch.tensor(0.25))
        assert step_table._plans == plans
        # The second call's sizes are new: it keeps its plan and two tables.
        assert (len(kept), len(pinned)) == (5, 3)
    assert torch.equal(calls[0]["params"][2], calls[1]["params"][2])


def test_a_graph_that_would_not_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    # No tensors, since there may be no GPU to have them on.
    on_gpu, on_cpu = (
        cast("Tensor", SimpleNamespace(is_cuda=where, device=where)) for where in (True, False)
    )
    refuse_uncounted([on_cpu], [on_cpu])
    refuse_uncounted([on_gpu], [on_gpu])
    with pytest.raises(RuntimeError, match=r"state_steps\[1\] must be on params' device"):
        refuse_uncounted([on_gpu], [on_gpu, on_cpu])


def test_explain() -> None:
    lists = call()
    expected = "reference" if native.why_not() else "native"
    assert bigops.explain(adam, **lists, max_grad_norm=1.0).backend == expected
    assert bigops.explain(grad_norm, lists["grads"]).backend == expected
    assert torch.equal(lists["params"][0], torch.ones(3))


def test_an_infinite_parameter_decays_as_torchs() -> None:
    """To itself: inf - decay * inf would be NaN."""
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0])
    options = {"lr": 0.5, "weight_decay": 0.25, "decoupled_weight_decay": True}
    results = []
    for run in (adam, torch_adam):
        param, grad = values.clone(), torch.ones(4)
        lists = ([param], [grad], [torch.zeros(4)], [torch.zeros(4)], [], [torch.tensor(0.0)])
        if run is adam:
            with bigops.use_backend(BACKEND):
                adam(*lists, **options)
        else:
            rest = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "maximize": False}
            torch_adam(*lists, **rest, **options)
        results.append(param)
    torch.testing.assert_close(*results, equal_nan=True)
