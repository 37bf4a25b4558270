"""state_dtype and master_weights of the optimizers: states in fewer bits, masters in more.

By the native kernels; test_adam.py runs some by Triton's, interpreted.
"""

from __future__ import annotations

import copy
import os
import pickle
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops.ops.adam import adam
from bigops.ops.sgd import sgd
from bigops.reference import codes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
COMMON = runpy.run_path(str(Path(__file__).with_name("test_optim.py")))
parameters, set_gradients, run = (COMMON[n] for n in ("parameters", "set_gradients", "run"))
tensors, assert_equal, LAYOUTS = (COMMON[n] for n in ("tensors", "assert_equal", "LAYOUTS"))

CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (bigops.optim.AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "SGD": (bigops.optim.SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
}
every = pytest.mark.parametrize(("ours", "theirs", "options"), CLASSES.values(), ids=CLASSES)
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
LONG = (5_000 if INTERPRETED else 70_000,)
SHAPES = [(7,), (65, 64), (), (0, 3), (2, 3, 5, 4), (513,)]


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with bigops.use_backend("triton" if INTERPRETED else None):
        yield


@SIGNED
def test_codes_are_near_and_unbiased(signed: bool) -> None:
    """Each within a code's spacing, and over all as much above as below."""
    values = torch.randn(300, 1000) * torch.logspace(-3, 3, 300)[:, None]
    values = values if signed else values.square()
    code, scale = codes.encode(values, signed)
    found = codes.decode(code, scale, signed)
    least = scale.repeat_interleave(codes.BLOCK).view(-1)[: values.numel()].view_as(values)
    least = least * 2.0 ** (-14 if signed else -30)
    assert ((found - values).abs() <= values.abs() / 8 + least).all()
    usual = values.abs() > 100 * least
    relative = (found / values)[usual] - 1
    assert relative.abs().mean() > 0.01
    assert abs(relative.mean()) < 4 * relative.std() / usual.sum() ** 0.5
    assert torch.equal(code & (127 if signed else 255) == 0, found == 0)


def test_a_positive_number_never_becomes_zero() -> None:
    """It would be divided by."""
    values = torch.tensor([1e-30, 1.0, 0.0] + [1e-12] * 200)
    found = codes.decode(*codes.encode(values, signed=False), signed=False)
    assert torch.equal(found > 0, values > 0)
    nothing = torch.zeros(300)
    assert torch.equal(codes.decode(*codes.encode(nothing, True), True), nothing)


def coded_call(op: Any, shapes: Any, layout: Any, dtype: torch.dtype) -> dict[str, Any]:
    def draw(scale: float = 1.0) -> list[Tensor]:
        return [layout((scale * torch.randn(s)).to(dtype)) for s in shapes]

    call = {"params": draw(), "grads": draw(0.1), "max_grad_norm": 1.0}
    states = [("exp_avg", True), ("exp_avg_sq", False)] if op is adam else [("momentum_buffer", 1)]
    for name, signed in states:
        coded = [codes.encode(v if signed else v.square(), bool(signed)) for v in draw(0.1)]
        call[f"{name}s"], call[f"{name}_scales"] = (list(x) for x in zip(*coded, strict=True))
    if op is adam:
        return call | {"max_exp_avg_sqs": [], "state_steps": [torch.tensor(5.0) for _ in shapes]}
    return call | {"momentum": 0.9, "dampening": 0.1}


@pytest.mark.parametrize("op", [adam, sgd], ids=["adam", "sgd"])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_step_on_codes_is_the_references(
    op: Any, layout: str, dtype: torch.dtype
) -> None:
    """Parameters to a few ulp; codes, which the last digit decides, to the next one."""
    shapes = [(3, 18, 17, 5), (2, 3, 1, 1)] if layout in LAYOUTS else [*SHAPES, LONG]
    laid = LAYOUTS.get(layout, lambda t: t)
    call = coded_call(op, shapes, laid, dtype)
    results = []
    for backend in (BACKEND, "reference"):
        own = copy.deepcopy(call)
        with bigops.use_backend(backend):
            op(**own)
        results.append(own)
    for name, found in results[0].items():
        if not isinstance(found, list):
            continue
        for mine, want in zip(found, results[1][name], strict=True):
            if mine.dtype != torch.uint8:
                torch.testing.assert_close(mine, want)
                continue
            off = mine.int() - want.int()
            assert not off.numel() or off.abs().max() <= 1
            assert off.numel() < 1000 or off.float().mean().abs() < 0.05


@every
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_state_dicts(ours: Any, theirs: Any, options: Any, state_dtype: str) -> None:
    """The same bits go on after a save; torch's state is taken, and given back through ours."""
    started = ours(parameters(shapes=SHAPES), state_dtype=state_dtype, **options)
    run(started, steps=range(5))
    saved = pickle.loads(pickle.dumps(started.state_dict()))
    copied = [torch.nn.Parameter(p.detach().clone()) for p in started.param_groups[0]["params"]]
    resumed = ours(copied, state_dtype=state_dtype, **options)
    resumed.load_state_dict(saved)
    plain = ours([torch.nn.Parameter(p.detach().clone()) for p in copied], **options)
    plain.load_state_dict(saved)
    theirs(copied, **options).load_state_dict(plain.state_dict())
    for optimizer in (started, resumed):
        run(optimizer, steps=range(5, 10))
    assert_equal(started, resumed)
    torchs = theirs(parameters(shapes=SHAPES), **options)
    run(torchs, steps=range(5))
    taken = ours(parameters(shapes=SHAPES), state_dtype=state_dtype, **options)
    taken.load_state_dict(torchs.state_dict())
    for param, other in zip(
        taken.param_groups[0]["params"], torchs.param_groups[0]["params"], strict=True
    ):
        state, whole = taken.state[param], torchs.state[other]
        for key, signed in taken._signed.items():
            if key not in whole:
                continue
            if state_dtype == "int8":
                found = codes.decode(state[f"{key}_code"], state[f"{key}_scale"], signed)
                assert torch.equal(state[f"{key}_code"], codes.encode(whole[key], signed)[0])
                assert ((found - whole[key]).abs() <= (1e-30 + whole[key].norm()) / 8).all()
            else:
                assert torch.equal(state[key], whole[key].bfloat16())


def test_torchs_class_says_that_it_cannot_read_codes() -> None:
    ours = bigops.optim.Adam(parameters(), state_dtype="int8")
    run(ours, steps=range(2))
    torchs = torch.optim.Adam(parameters())
    torchs.load_state_dict(ours.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        run(torchs, steps=range(1))


@every
def test_codes_take_a_quarter_of_the_memory(ours: Any, theirs: Any, options: Any) -> None:
    def held(optimizer: Any) -> int:
        run(optimizer, steps=range(1))
        (state,) = optimizer.state.values()
        return sum(t.numel() * t.element_size() for t in state.values() if t.dim())

    sizes = [
        held(ours([torch.nn.Parameter(torch.ones(256_000))], state_dtype=kind, **options))
        for kind in (None, "bfloat16", "int8")
    ]
    assert sizes[0] == 2 * sizes[1]
    assert sizes[0] / sizes[2] == pytest.approx(4, rel=0.02)


def digits_loss(make: Any, seed: int) -> float:
    """The mean loss of the last epochs, on scikit-learn's digits, when it no longer falls."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.data[:1024], dtype=torch.float32) / 16
    y = torch.tensor(digits.target[:1024])
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=320)
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for step in range(320):
        chosen = torch.arange(step * 128, (step + 1) * 128) % 1024
        optimizer.zero_grad()
        smooth(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return smooth(model(x), y).item()


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_training_converges_within_a_hundredth_of_float32(state_dtype: str) -> None:
    for seed in range(2):
        wide = digits_loss(lambda p: torch.optim.AdamW(p), seed)
        ours = digits_loss(lambda p: bigops.optim.AdamW(p, state_dtype=state_dtype), seed)
        assert wide < 0.6
        assert ours == pytest.approx(wide, rel=0.01)


@every
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters(
    ours: Any, theirs: Any, options: Any, state_dtype: str | None, dtype: torch.dtype
) -> None:
    """They are the parameters of a float32 run of the same gradients, bit by bit."""
    kinds = {"state_dtype": state_dtype, "max_grad_norm": 1.0, **options}
    low = ours(parameters(dtype, SHAPES) + parameters(shapes=[(9,)]), master_weights=True, **kinds)
    own = [torch.nn.Parameter(p.detach().float()) for p in low.param_groups[0]["params"]]
    wide = ours(own, **kinds)
    run(low, dtype, range(4))
    saved = pickle.loads(pickle.dumps(low.state_dict()))
    low = ours(low.param_groups[0]["params"], master_weights=True, **kinds)
    low.load_state_dict(saved)
    run(low, dtype, range(4, 8))
    run(wide, dtype, range(8))
    for param, other in zip(low.param_groups[0]["params"], own, strict=True):
        if param.dtype == torch.float32:
            assert "master_param" not in low.state[param]
            torch.testing.assert_close(param, other)
        else:
            master = low.state[param]["master_param"]
            torch.testing.assert_close(master, other.detach())
            assert torch.equal(param, master.to(dtype))


def test_masters_keep_what_a_low_precision_parameter_loses() -> None:
    """A thousand updates of a thousandth of an ulp each."""
    for masters, moved in ((False, 0.0), (True, -0.5)):
        param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = bigops.optim.SGD([param], lr=2**-11, master_weights=masters)
        for _ in range(1024):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert torch.equal(param - 1, torch.full_like(param, moved))


@pytest.mark.parametrize("op", [adam, sgd], ids=["adam", "sgd"])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "codes"])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_the_kernels_stochastic_rounding_is_the_references(
    op: Any, coded: bool, layout: str
) -> None:
    """By the same bits; where the last digit of a float32 decides, to the next bfloat16."""
    shapes = [(3, 18, 17, 5), (2, 3, 1, 1)] if layout in LAYOUTS else [*SHAPES, LONG]
    call = coded_call(op, shapes, LAYOUTS.get(layout, lambda t: t), torch.bfloat16)
    if not coded:
        for name in [name for name in call if name.endswith("_scales")]:
            key = name.removesuffix("_scales") + "s"
            pairs = zip(call[key], call.pop(name), strict=True)
            signed = key != "exp_avg_sqs"
            call[key] = [codes.decode(c, s, signed).bfloat16() for c, s in pairs]
    results = []
    for backend in (BACKEND, "reference"):
        own = copy.deepcopy(call)
        with bigops.use_backend(backend):
            op(**own, rounding_seed=torch.tensor(2**40 + 7))
        results.append(own["params"])
    for mine, want in zip(*results, strict=True):
        torch.testing.assert_close(mine, want, rtol=2**-7, atol=1e-30)
        assert mine.numel() < 1000 or (mine != want).float().mean() < 0.01


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    """Updates of a fraction of a spacing move parameters by their sum, on average."""
    results = []
    for seed in (0, 0, 1):
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = bigops.optim.SGD([param], lr=2**-12, stochastic_rounding=True)
        torch.manual_seed(seed)
        for _ in range(1024):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved = param.detach().double() - 1
        assert moved.std() > 0.001
        assert abs(moved.mean() + 0.25) < 4 * moved.std() / 4096**0.5
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_stochastic_rounding_leaves_infinity_and_nan() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).bfloat16()
    param = torch.nn.Parameter(values.clone())
    param.grad = torch.zeros(4).bfloat16()
    bigops.optim.SGD([param], stochastic_rounding=True).step()
    torch.testing.assert_close(param.detach(), values, equal_nan=True)


@pytest.mark.parametrize(
    ("cls", "options", "word"),
    [
        (bigops.optim.Adam, {"state_dtype": "int4"}, "state_dtype"),
        (bigops.optim.SGD, {"state_dtype": torch.bfloat16}, "state_dtype"),
        (bigops.optim.AdamW, {"state_dtype": "int8", "amsgrad": True}, "state_dtype"),
        (bigops.optim.Adam, {"master_weights": True, "stochastic_rounding": True}, "stochastic"),
    ],
)
def test_what_does_not_go_together_is_refused(cls: Any, options: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        cls(parameters(), **options)
    with pytest.raises(ValueError, match="state_dtype must be None for parameters of"):
        cls(parameters(torch.float64), state_dtype="int8")
