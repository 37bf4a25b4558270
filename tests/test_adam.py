"""The op adam beyond its table samples: averages without a bias, bad tensors, the norm.

On native in this process, on Triton where it says so in an interpreted one; test_optim.py has the
optimizers, test_ops.py the truth over the samples.
"""

from __future__ import annotations

import copy
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

import bigops
from bigops.backends import native
from bigops.ops.adam import adam, grad_norm

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


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_interpreted() -> None:
    INTERPRETER["session"](__file__, "-k", "not_rounded or after_right_calls or infinite", at_least=3)


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


def test_explain() -> None:
    lists = call()
    expected = "reference" if native.why_not() else "native"
    assert bigops.explain(adam, **lists, max_grad_norm=1.0).backend == expected
    assert bigops.explain(grad_norm, lists["grads"]).backend == expected
    assert torch.equal(lists["params"][0], torch.ones(3))


def test_an_infinite_parameter_decays_as_torchs() -> None:
    """To itself: inf - decay * inf would be NaN."""
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0])
    options = {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True}
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
