"""bigops.optim's classes by PyTorch's own measure: its optimizer tests' inputs, those that it
refuses among them; and long runs against its float64 one."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops import check

pytest.importorskip("expecttest")  # which torch's own tests import
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

# The import forbids the process to set torch's flags, as other tests here do.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

COMMON = runpy.run_path(str(Path(__file__).with_name("test_optim.py")))
parameters, run, assert_as_true = (COMMON[n] for n in ("parameters", "run", "assert_as_true"))
INFOS = {
    info.optim_cls.__name__: info
    for info in optim_db
    if hasattr(bigops.optim, info.optim_cls.__name__)
}
FLAGS: tuple[dict[str, Any], ...] = ({}, {"foreach": True}, {"foreach": False}, {"fused": True})
INPUTS = [
    pytest.param(name, given.kwargs, flags, id=f"{name}-{given.desc}-{flags or 'no flag'}")
    for name, info in INFOS.items()
    for given in info.optim_inputs_func(device="cpu")
    for flags in FLAGS
]


def test_all_of_ours_are_among_them() -> None:
    assert set(INFOS) == {"Adam", "AdamW", "SGD"}
    assert len(INPUTS) >= 4 * 19


@pytest.mark.parametrize(("name", "options", "flags"), INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs(
    name: str, options: dict[str, Any], flags: dict[str, Any], dtype: torch.dtype
) -> None:
    ours, theirs = getattr(bigops.optim, name), getattr(torch.optim, name)

    def made(cls: Any, params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = cls(params, **copy.deepcopy(options), **flags)
        run(optimizer, dtype, range(10))
        return optimizer

    doubled = [torch.nn.Parameter(p.detach().double()) for p in parameters(dtype)]
    mine, torchs = made(ours, parameters(dtype)), made(theirs, parameters(dtype))
    assert_as_true(mine, torchs, made(theirs, doubled))
    carried_on = theirs(mine.param_groups[0]["params"])
    carried_on.load_state_dict(mine.state_dict())
    assert mine.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]
    run(carried_on, dtype, range(2))


@pytest.mark.parametrize("name", INFOS)
def test_refused_inputs(name: str) -> None:
    refused = 0
    for given in INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        if given.error_on != OptimizerErrorEnum.CONSTRUCTION_ERROR:
            continue
        wrong = given.optimizer_error_input
        warns = issubclass(given.error_type, Warning)
        with (pytest.warns if warns else pytest.raises)(given.error_type):
            getattr(bigops.optim, name)(wrong.params, **wrong.kwargs)
        refused += 1
    assert refused >= 4


@pytest.mark.parametrize("name", INFOS)
def test_200_steps_stay_with_torchs_float64_run(name: str) -> None:
    """Within 2 ulp of the largest parameter, by the mean square; and each by the error rule."""
    options = {"momentum": 0.9, "nesterov": True} if name == "SGD" else {}

    def made(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(torch.float32)]
        optimizer = cls(params, lr=1e-3, weight_decay=0.01, **options)
        run(optimizer, torch.float32, range(200))
        return optimizer

    mine, torchs, exact = (
        made(getattr(bigops.optim, name), torch.float32),
        made(getattr(torch.optim, name), torch.float32),
        made(getattr(torch.optim, name), torch.float64),
    )
    assert_as_true(mine, torchs, exact)
    found, want = (
        torch.cat([p.detach().double().flatten() for p in o.param_groups[0]["params"]])
        for o in (mine, exact)
    )
    error = (found - want).square().mean().sqrt().item()
    assert error <= 2 * check.ulp(want.abs().max().item(), torch.float32)
