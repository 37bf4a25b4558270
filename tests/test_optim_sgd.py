"""bigops.optim.SGD against torch's: same trajectories, same state dicts, same manners.

The op's truth, over the table's samples, is in test_ops.py.
"""

from __future__ import annotations

import copy
import math
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops.backends import native

COMMON = runpy.run_path(str(Path(__file__).with_name("test_optim.py")))
STEPS, LAYOUTS = COMMON["STEPS"], COMMON["LAYOUTS"]
parameters, set_gradients, run = (COMMON[n] for n in ("parameters", "set_gradients", "run"))
tensors, assert_as_true, assert_equal = (
    COMMON[n] for n in ("tensors", "assert_as_true", "assert_equal")
)
OURS, TORCHS = bigops.optim.SGD, torch.optim.SGD
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.03},
    "momentum": {"momentum": 0.9, "lr": 0.02},
    "dampening": {"momentum": 0.9, "dampening": 0.5, "lr": 0.02},
    "nesterov": {"momentum": 0.9, "nesterov": True, "lr": 0.02},
    "decay": {"weight_decay": 0.3, "lr": 0.01},
    "maximize": {"maximize": True, "weight_decay": 0.1, "momentum": 0.5},
    "all": {"momentum": 0.8, "nesterov": True, "maximize": True, "weight_decay": 0.1, "lr": 0.02},
    "foreach": {"foreach": True, "momentum": 0.9},
    "fused": {"fused": True, "momentum": 0.9},
    "no foreach": {"foreach": False, "fused": False, "momentum": 0.9},
    "tensor lr": {"lr": torch.tensor(0.02), "momentum": 0.9},
    "tensor lr of one element": {"lr": torch.tensor([0.02], dtype=torch.float64)},
}


def doubled(dtype: torch.dtype) -> list[Tensor]:
    return [torch.nn.Parameter(p.detach().double()) for p in parameters(dtype)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trajectory(options: dict[str, Any], dtype: torch.dtype) -> None:
    optimizers = [
        OURS(parameters(dtype), **options),
        TORCHS(parameters(dtype), **options),
        TORCHS(doubled(dtype), **options),
    ]
    for optimizer in optimizers:
        run(optimizer, dtype)
    assert_as_true(*optimizers)


def test_groups_schedulers_and_clipping() -> None:
    def trained(cls: Any, dtype: torch.dtype, **clip: Any) -> torch.optim.Optimizer:
        first, *rest = parameters(dtype)
        groups = [
            {"params": [first], "lr": 0.5, "momentum": 0.0},
            {"params": rest[:2], "weight_decay": 0.2, "nesterov": True},
        ]
        optimizer = cls(groups, lr=0.01, momentum=0.9, **clip)
        optimizer.add_param_group({"params": rest[2:], "maximize": True})
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=True
        )

        def clipped(params: list[Tensor]) -> None:
            if not clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0)

        run(optimizer, before=clipped, after=schedule.step)
        return optimizer

    assert_as_true(
        trained(OURS, torch.float32, max_grad_norm=1.0),
        trained(TORCHS, torch.float32),
        trained(TORCHS, torch.float64),
    )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_state_dicts_are_interchangeable(dtype: torch.dtype) -> None:
    options = {"momentum": 0.9, "dampening": 0.1, "lr": 0.02}

    def carried_on(first: Any, second: Any) -> torch.optim.Optimizer:
        start = first(parameters(dtype), **options)
        run(start, torch.bfloat16, range(0, 10))
        saved = pickle.loads(pickle.dumps(start.state_dict()))
        end = second(
            [torch.nn.Parameter(p.detach().clone()) for p in start.param_groups[0]["params"]]
        )
        end.load_state_dict(saved)
        run(end, torch.bfloat16, range(10, 20))
        return end

    never_saved, exact = TORCHS(parameters(dtype), **options), TORCHS(doubled(dtype), **options)
    for optimizer in (never_saved, exact):
        run(optimizer, torch.bfloat16)
    for pair in ((OURS, TORCHS), (TORCHS, OURS), (OURS, OURS)):
        assert_as_true(carried_on(*pair), never_saved, exact)


def test_state_dict_is_torchs() -> None:
    dicts = []
    for cls in (OURS, TORCHS):
        optimizer = cls(parameters(), momentum=0.9)
        run(optimizer, steps=range(3))
        dicts.append(optimizer.state_dict())
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    assert [list(s) for s in dicts[0]["state"].values()] == [["momentum_buffer"]] * 5
    assert dicts[0]["state"].keys() == dicts[1]["state"].keys()
    plain = [cls(parameters()) for cls in (OURS, TORCHS)]
    for optimizer in plain:
        run(optimizer, steps=range(3))
    assert plain[0].state_dict()["state"] == plain[1].state_dict()["state"] == {}
    assert issubclass(OURS, TORCHS)


def test_gradients_come_and_go() -> None:
    """Some parameters' first step is another's fifth; a buffer that is None counts as none."""

    def trained(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        params = parameters(dtype)
        optimizer = cls(params, lr=0.1, momentum=0.9, dampening=0.3)
        for step in range(STEPS):
            set_gradients(params, step, torch.float32)
            for i in range(5):
                if step < 2 * i or (step + i) % 4 == 0:
                    params[i].grad = None
            if step == 7:
                optimizer.state[params[1]]["momentum_buffer"] = None
            optimizer.step()
        return optimizer

    assert_as_true(
        trained(OURS, torch.float32), trained(TORCHS, torch.float32), trained(TORCHS, torch.float64)
    )


@pytest.mark.parametrize("of", ["parameters", "gradients", "both"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(of: str, layout: Any) -> None:
    def trained(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        params = parameters(dtype, [(3, 18, 17, 5), (2, 3, 1, 1)])
        if of != "gradients":
            params = [torch.nn.Parameter(layout(p.detach())) for p in params]
        optimizer = cls(params, momentum=0.9)

        def lay_out(params: list[Tensor]) -> None:
            for p in params:
                if of != "parameters":
                    p.grad = layout(p.grad)

        run(optimizer, before=lay_out, steps=range(4))
        return optimizer

    assert_as_true(
        trained(OURS, torch.float32), trained(TORCHS, torch.float32), trained(TORCHS, torch.float64)
    )


def test_complex_parameters() -> None:
    results = []
    for cls in (OURS, TORCHS):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(70, 61, dtype=torch.complex64, generator=generator))
        optimizer = cls([param], lr=0.1, momentum=0.9, nesterov=True)
        for step in range(4):
            grad = torch.randn(70, 61, dtype=torch.complex64, generator=generator)
            param.grad = grad.conj() if step % 2 else grad
            optimizer.step()
        results.append((param.detach(), optimizer.state[param]["momentum_buffer"].resolve_conj()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("overflow", [(), (1,), (0, 2)], ids=str)
def test_gradscaler(overflow: tuple[int, ...]) -> None:
    """Torch's own class without fused=True never sees a step that is skipped."""
    results = []
    for cls in (OURS, TORCHS):
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=0.9, dampening=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(4):
            scaler.scale(torch.zeros(()))  # starts the scaler
            set_gradients(params, step, torch.float32, scale=8.0)
            if step in overflow:
                params[1].grad[3, 4] = float("inf")
            scaler.step(optimizer)
            scaler.update(8.0)
        results.append(tensors(optimizer))
    for (name, mine), torchs in zip(results[0].items(), results[1].values(), strict=True):
        torch.testing.assert_close(mine, torchs, msg=name)


def test_sparse_gradients_are_refused_and_nothing_is_written() -> None:
    dense, embedding = torch.nn.Parameter(torch.ones(3)), torch.nn.Embedding(4, 2, sparse=True)
    groups = [{"params": [dense]}, {"params": embedding.parameters()}]
    for momentum in (0.0, 0.9):
        optimizer = OURS(groups, lr=0.1, momentum=momentum)
        dense.grad = torch.ones(3)
        embedding.weight.grad = None
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match="SGD does not support sparse gradients"):
            optimizer.step()
        assert torch.equal(dense, torch.ones(3))
        assert not optimizer.state_dict()["state"]


BAD = {
    "lr": [-1.0, math.nan, "fast", None, torch.ones(2)],
    "momentum": [-0.1, math.nan, []],
    "dampening": ["none", None],
    "weight_decay": [-0.1, math.nan],
    "max_grad_norm": [-1.0, math.nan, "one"],
    "differentiable": [True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=str
)
def test_bad_options_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        OURS(parameters(), **{name: value})
    if name != "max_grad_norm":
        good = OURS(parameters())
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            good.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], name: value})
        assert len(good.param_groups) == 1


def test_nesterov_wants_momentum_as_torchs() -> None:
    for cls in (OURS, TORCHS):
        for options in ({}, {"momentum": 0.9, "dampening": 0.1}):
            with pytest.raises(ValueError, match="Nesterov momentum requires"):
                cls(parameters(), nesterov=True, **options)


def test_copies() -> None:
    optimizer = OURS(parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0)
    run(optimizer, steps=range(3))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is OURS
        assert copied.max_grad_norm == 1.0
        reference = copy.deepcopy(optimizer)
        for one in (copied, reference):
            run(one, steps=range(3, 6))
        assert_equal(copied, reference)


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_one_native_call_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            if name != "collect":  # looks the tensors up and computes nothing
                calls.append(name)
            return getattr(kernels, name)

    kernels = native.kernels
    monkeypatch.setattr(native, "kernels", Counting())
    first, second = ([torch.nn.Parameter(torch.ones(i % 9)) for i in range(50)] for _ in range(2))
    for momentum in (0.0, 0.9):
        optimizer = OURS([{"params": first}, {"params": second}], momentum=momentum)
        set_gradients(first + second, 0, torch.float32)
        for _ in range(3):
            calls.clear()
            optimizer.step()
            assert calls == ["sgd", "sgd"]


def test_compiled_step() -> None:
    """torch.compile traces the plain-torch reference and gives the same trajectory."""
    optimizers = [OURS(parameters(), momentum=0.9, max_grad_norm=1.0) for _ in range(2)]
    for optimizer in optimizers:
        run(optimizer, steps=range(1))
    run(optimizers[0], steps=range(1, 3))
    step = torch.compile(optimizers[1].step, backend="aot_eager")
    for i in range(1, 3):
        set_gradients(optimizers[1].param_groups[0]["params"], i, torch.float32)
        step()
    for (name, a), b in zip(
        tensors(optimizers[0]).items(), tensors(optimizers[1]).values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)
