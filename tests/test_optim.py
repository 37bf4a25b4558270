"""bigops.optim.Adam and AdamW against torch's: same trajectories, same state dicts, same manners.

The op itself is in test_adam.py, and its truth, over the table's samples, in test_ops.py.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bigops
from bigops import check
from bigops.backends import native
from bigops.ops.adam import GRAD_NORM, OP

CLASSES = {
    "Adam": (bigops.optim.Adam, torch.optim.Adam),
    "AdamW": (bigops.optim.AdamW, torch.optim.AdamW),
}
SHAPES = [(7,), (65, 64), (), (0, 3), (2, 3, 5, 4)]
STEPS = 20

both = pytest.mark.parametrize(("ours", "theirs"), CLASSES.values(), ids=CLASSES)


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[Any] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(t.to(dtype)) for t in drawn]


def set_gradients(
    params: Sequence[Tensor], seed: int, grid: torch.dtype, scale: float = 1.0
) -> None:
    """The same gradients whatever the parameters' dtype: numbers that `grid` has."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        drawn = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = drawn.to(grid).to(p.dtype)


def run(
    optimizer: torch.optim.Optimizer,
    grid: torch.dtype = torch.float32,
    steps: range = range(STEPS),
    before: Callable[[list[Tensor]], Any] = lambda params: None,
    after: Callable[[], Any] = lambda: None,
) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, step, grid)
        before(params)
        optimizer.step()
        after()
    return params


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {f"param {i}": p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"{name} {i}": t for name, t in optimizer.state[p].items()}
    return found


def assert_as_true(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, exact: torch.optim.Optimizer
) -> None:
    """The project's error rule, for every parameter and state."""
    got, eager, want = tensors(ours), tensors(theirs), tensors(exact)
    assert got.keys() == eager.keys() == want.keys()
    for name in want:
        assert got[name].dtype == eager[name].dtype, name
        assert got[name].stride() == eager[name].stride(), name
        if got[name].dtype == torch.float64:
            # torch's float64 run is the truth itself; a few ulp a step is what rounding may differ.
            torch.testing.assert_close(got[name], want[name], rtol=STEPS * 1e-15, atol=1e-14)
            continue
        comparison = check.compare(name, got[name], eager[name], want[name])
        assert comparison.ok, comparison


def assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for (name, x), (other, y) in zip(tensors(a).items(), tensors(b).items(), strict=True):
        assert name == other
        assert torch.equal(x, y), name


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.1},
    "betas": {"betas": (0.3, 0.99)},
    "beta 0": {"betas": (0.0, 0.0), "eps": 1e-3},
    "eps": {"eps": 0.1},
    "decay": {"weight_decay": 0.3, "lr": 0.01},
    "no decay": {"weight_decay": 0},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "all": {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "lr": 0.02},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "no foreach": {"foreach": False, "fused": False},
    "tensor lr": {"lr": torch.tensor(0.02)},
    "tensor lr of one element": {"lr": torch.tensor([0.02], dtype=torch.float64)},
    "tensor betas": {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
}


@both
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_trajectory(ours: Any, theirs: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype != torch.float32 and "tensor" in str(options):
        pytest.skip("one dtype is enough")
    optimizers = [
        ours(parameters(dtype), **options),
        theirs(parameters(dtype), **options),
        theirs([torch.nn.Parameter(p.detach().double()) for p in parameters(dtype)], **options),
    ]
    for optimizer in optimizers:
        run(optimizer, dtype)
    assert_as_true(*optimizers)


def test_float16_where_torch_overflows() -> None:
    """torch adds eps to a float16 denominator, where 1e-8 is 0; here arithmetic is float32."""
    ours = bigops.optim.Adam(parameters(torch.float16))
    exact = torch.optim.Adam(parameters(torch.float64))
    for p, q in zip(run(ours, torch.float16), run(exact, torch.float16), strict=True):
        torch.testing.assert_close(p.double(), q.half().double(), rtol=2e-2, atol=2e-2)


@both
def test_mixed_dtypes_in_one_group(ours: Any, theirs: Any) -> None:
    def mixed(*dtypes: torch.dtype) -> list[Tensor]:
        return [p for dtype in dtypes for p in parameters(dtype)]

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    optimizers = [ours(mixed(*dtypes)), theirs(mixed(*dtypes)), theirs(mixed(*[torch.float64] * 3))]
    for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers[1:]), strict=True):
        q.data.copy_(p.data)
    for optimizer in optimizers:
        run(optimizer, torch.bfloat16)
    assert_as_true(*optimizers)


@both
def test_groups_and_schedulers(ours: Any, theirs: Any) -> None:
    def trained(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        first, *rest = parameters(dtype)
        groups = [
            {"params": [first], "lr": 0.5, "amsgrad": True},
            {"params": rest[:2], "weight_decay": 0.2, "betas": (0.8, 0.95)},
        ]
        optimizer = cls(groups, lr=0.01)
        optimizer.add_param_group({"params": rest[2:], "maximize": True})
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)
        run(optimizer, after=schedule.step)
        return optimizer

    assert_as_true(
        trained(ours, torch.float32), trained(theirs, torch.float32), trained(theirs, torch.float64)
    )


@both
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dicts_are_interchangeable(
    ours: Any, theirs: Any, amsgrad: bool, dtype: torch.dtype
) -> None:
    def carried_on(first: Any, second: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        options = {"amsgrad": amsgrad, "lr": 0.02}
        start = first(parameters(dtype), **options)
        run(start, torch.bfloat16, range(0, 10))
        saved = pickle.loads(pickle.dumps(start.state_dict()))
        end = second(
            [torch.nn.Parameter(p.detach().clone()) for p in start.param_groups[0]["params"]]
        )
        end.load_state_dict(saved)
        run(end, torch.bfloat16, range(10, 20))
        return end

    never_saved = theirs(parameters(dtype), amsgrad=amsgrad, lr=0.02)
    run(never_saved, torch.bfloat16)
    exact = theirs(
        [torch.nn.Parameter(p.detach().double()) for p in parameters(dtype)],
        amsgrad=amsgrad,
        lr=0.02,
    )
    run(exact, torch.bfloat16)
    for pair in ((ours, theirs), (theirs, ours), (ours, ours)):
        assert_as_true(carried_on(*pair, dtype), never_saved, exact)


@both
def test_state_dict_is_torchs(ours: Any, theirs: Any) -> None:
    dicts = []
    for cls in (ours, theirs):
        optimizer = cls(parameters(), amsgrad=True)
        run(optimizer)
        dicts.append(optimizer.state_dict())
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    for i, state in dicts[1]["state"].items():
        assert (
            list(dicts[0]["state"][i])
            == list(state)
            == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        )
        for name, value in state.items():
            mine = dicts[0]["state"][i][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
    assert issubclass(ours, theirs)


def test_step_dtype_is_torchs() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for fused in (None, True):
            optimizers = [cls(parameters(), fused=fused) for cls in CLASSES["Adam"]]
            steps = [o.state[run(o, steps=range(3))[1]]["step"] for o in optimizers]
            assert steps[0].dtype == steps[1].dtype
            assert steps[0] == steps[1] == 3
    finally:
        torch.set_default_dtype(torch.float32)


@both
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping(ours: Any, theirs: Any, max_norm: float, dtype: torch.dtype) -> None:
    def trained(cls: Any, dtype: torch.dtype, **options: Any) -> torch.optim.Optimizer:
        first, *rest = [
            torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(torch.bfloat16)
        ]
        optimizer = cls([{"params": [first]}, {"params": rest, "lr": 0.1}], **options)

        def clip(params: list[Tensor]) -> None:
            if not options:
                torch.nn.utils.clip_grad_norm_(params, max_norm)

        run(optimizer, torch.bfloat16, before=clip)
        return optimizer

    assert_as_true(
        trained(ours, dtype, max_grad_norm=max_norm),
        trained(theirs, dtype),
        trained(theirs, torch.float64),
    )


def test_clipping_leaves_gradients_alone_and_tells_the_norm() -> None:
    params = parameters()
    optimizer = bigops.optim.AdamW(params, max_grad_norm=0.5)
    assert optimizer.grad_norm is None
    set_gradients(params, 0, torch.float32)
    before = [p.grad.clone() for p in params]
    want = torch.nn.utils.get_total_norm(before)
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    torch.testing.assert_close(optimizer.grad_norm, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_of_nonfinite_gradients_is_torchs(bad: float) -> None:
    results = []
    for cls, options in ((bigops.optim.Adam, {"max_grad_norm": 1.0}), (torch.optim.Adam, {})):
        params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        params[0].grad, params[1].grad = torch.tensor([1.0, bad, 2.0]), torch.ones(2)
        optimizer = cls(params, **options)
        if not options:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        results.append(torch.cat([p.detach() for p in params]))
    torch.testing.assert_close(*results, equal_nan=True)


def test_infinite_averages_stay_as_in_torch() -> None:
    """A gradient whose square overflows ends an element's updates; it does not make it NaN."""
    results = []
    for cls in CLASSES["Adam"]:
        param = torch.nn.Parameter(torch.ones(4))
        optimizer = cls([param])
        for grad in (torch.full((4,), 1e25), torch.ones(4), torch.ones(4)):
            param.grad = grad
            optimizer.step()
        results.append(torch.stack([param.detach(), optimizer.state[param]["exp_avg_sq"]]))
    assert torch.equal(results[0].isinf(), results[1].isinf())
    assert not results[0].isnan().any()


BAD = {
    "lr": [-1.0, math.nan, "fast", None, torch.ones(2), torch.tensor(math.nan)],
    "eps": [-1e-8, math.nan, "small"],
    "weight_decay": [-0.1, math.nan, []],
    "betas": [(0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), (0.9, math.nan), 0.9, (0.9,), ("a", "b")],
    "max_grad_norm": [-1.0, math.nan, "one"],
    "differentiable": [True],
}


@both
@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=lambda v: str(v)
)
def test_bad_options_are_named(ours: Any, theirs: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        ours(parameters(), **{name: value})
    if name != "max_grad_norm":
        good = ours(parameters())
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            good.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], name: value})
        assert len(good.param_groups) == 1


@both
def test_bad_parameters_are_torchs(ours: Any, theirs: Any) -> None:
    twice = parameters()[0]
    for cls in (ours, theirs):
        with pytest.raises(ValueError, match="empty parameter list"):
            cls([])
        with pytest.raises(TypeError):
            cls(torch.ones(3))
        with pytest.raises(ValueError, match="leaf"):
            cls([torch.ones(3, requires_grad=True) * 2])
        with pytest.raises(ValueError, match="more than one parameter group"):
            cls([{"params": [twice]}, {"params": [twice]}])


def test_sparse_gradients_are_refused_and_nothing_is_written() -> None:
    dense, embedding = torch.nn.Parameter(torch.ones(3)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = bigops.optim.Adam([{"params": [dense]}, {"params": embedding.parameters()}])
    dense.grad = torch.ones(3)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert torch.equal(embedding.weight, before)


@both
def test_gradients_come_and_go(ours: Any, theirs: Any) -> None:
    def trained(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        params = parameters(dtype)
        params[1].requires_grad_(False)
        optimizer = cls(params, lr=0.1)
        for step in range(STEPS):
            set_gradients(params, step, torch.float32)
            params[1].grad = None
            params[step % 5].grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 3 > 0)
        return optimizer

    assert_as_true(
        *(
            trained(c, d)
            for c, d in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
        )
    )


@both
def test_parameters_and_states_move(ours: Any, theirs: Any) -> None:
    def trained(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        optimizer = cls(parameters(dtype), lr=0.1)

        def move(params: list[Tensor]) -> None:
            for p in params:
                p.data = p.data.clone()
                for name, t in optimizer.state[p].items():
                    optimizer.state[p][name] = t.clone()

        run(optimizer, before=move)
        return optimizer

    assert_as_true(
        *(
            trained(c, d)
            for c, d in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
        )
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@both
@pytest.mark.parametrize("of", ["parameters", "gradients", "both"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(ours: Any, theirs: Any, of: str, layout: Callable[[Tensor], Tensor]) -> None:
    def trained(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        params = parameters(dtype, [(3, 18, 17, 5), (2, 3, 1, 1)])
        if of != "gradients":
            params = [torch.nn.Parameter(layout(p.detach())) for p in params]
        optimizer = cls(params, amsgrad=True)

        def lay_out(params: list[Tensor]) -> None:
            for p in params:
                if of != "parameters":
                    p.grad = layout(p.grad)

        run(optimizer, before=lay_out, steps=range(5))
        return optimizer

    assert_as_true(
        *(
            trained(c, d)
            for c, d in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
        )
    )


def test_expanded_gradient() -> None:
    for cls in CLASSES["Adam"]:
        param = torch.nn.Parameter(torch.zeros(5, 7))
        param.grad = torch.ones(1).expand(5, 7)
        cls([param], lr=0.5).step()
        torch.testing.assert_close(param.detach(), torch.full((5, 7), -0.5))


@both
@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_parameters(ours: Any, theirs: Any, amsgrad: bool) -> None:
    def trained(cls: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(
                torch.randn(70, 61, dtype=torch.complex128, generator=generator).to(dtype)
            )
        ]
        optimizer = cls(params, lr=0.1, amsgrad=amsgrad)
        for step in range(5):
            drawn = torch.randn(70, 61, dtype=torch.complex64, generator=generator)
            params[0].grad = drawn.to(dtype).conj() if step % 2 else drawn.to(dtype)
            if cls is theirs:
                params[0].grad = params[0].grad.resolve_conj()
            optimizer.step()
        return optimizer

    mine, torchs = trained(ours, torch.complex64), trained(theirs, torch.complex64)
    for name, t in tensors(torchs).items():
        torch.testing.assert_close(tensors(mine)[name], t)


@both
def test_copies(ours: Any, theirs: Any) -> None:
    optimizer = ours(parameters(), lr=0.1, max_grad_norm=1.0)
    run(optimizer, steps=range(3))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is ours
        run(copied, steps=range(3, 6))
        assert copied.max_grad_norm == 1.0
        reference = copy.deepcopy(optimizer)
        run(reference, steps=range(3, 6))
        assert_equal(copied, reference)
    assert repr(optimizer).startswith(ours.__name__)


@both
def test_hooks_and_closures(ours: Any, theirs: Any) -> None:
    for cls in (ours, theirs):
        param, seen = torch.nn.Parameter(torch.ones(3)), []
        optimizer = cls([("weight", param)])
        optimizer.register_step_pre_hook(lambda *a, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *a, seen=seen: seen.append("after"))

        def closure(param: Tensor = param, seen: list[str] = seen) -> Tensor:
            seen.append("closure")
            loss = param.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 3.0
        assert seen == ["before", "closure", "after"]
        assert optimizer.param_groups[0]["param_names"] == ["weight"]
        assert optimizer.step() is None
        with pytest.raises(ValueError, match="parameter groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": []})


@both
def test_a_step_is_seen_by_autograd(ours: Any, theirs: Any) -> None:
    for cls in (ours, theirs):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = cls([param])
        loss = param.square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both
@pytest.mark.parametrize("overflow", [False, True])
def test_gradscaler(ours: Any, theirs: Any, overflow: bool) -> None:
    results = []
    for cls in (ours, theirs):
        params = parameters()
        optimizer, scaler = cls(params, lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            scaler.scale(torch.zeros(()))  # starts the scaler
            set_gradients(params, step, torch.float32, scale=8.0)
            if overflow and step == 1:
                params[1].grad[3, 4] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        results.append((optimizer, scaler.get_scale()))
    assert results[0][1] == results[1][1] == (4.0 if overflow else 8.0)
    for (name, mine), torchs in zip(
        tensors(results[0][0]).items(), tensors(results[1][0]).values(), strict=True
    ):
        torch.testing.assert_close(mine, torchs, msg=name)


def test_gradscaler_clips_the_unscaled_norm() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = bigops.optim.Adam([param], betas=(0.0, 0.0), eps=1.0, lr=1.0, max_grad_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    param.grad = 4.0 * torch.tensor([6.0, 8.0])
    optimizer.step()  # the gradient counts as (0.6, 0.8); the update is -g / (|g| + 1)
    torch.testing.assert_close(param.detach(), -torch.tensor([0.6 / 1.6, 0.8 / 1.8]))


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
    optimizer = bigops.optim.Adam([{"params": first}, {"params": second}], max_grad_norm=1.0)
    set_gradients(first + second, 0, torch.float32)
    optimizer.step()
    assert calls == ["grad_norm", "adam", "adam"]


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_a_step_computes_with_our_kernels_alone() -> None:
    params = parameters()
    optimizer = bigops.optim.AdamW(params, max_grad_norm=1.0)
    run(optimizer, steps=range(2))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    with Watch() as watch:
        optimizer.step()
    declared = {
        name.removeprefix("aten.") for b in (*OP.backends, *GRAD_NORM.backends) for name in b.aten
    }
    computing = {name for name in watch.seen if not name.startswith("_record_function")}
    assert computing <= {"empty"} | declared


def test_same_bits_in_every_run_and_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    shapes = [(70_001,), (3, 50_000), *[(101,)] * 300]

    def trained() -> torch.optim.Optimizer:
        optimizer = bigops.optim.AdamW(parameters(shapes=shapes), max_grad_norm=1.0, amsgrad=True)
        run(optimizer, steps=range(3))
        return optimizer

    first = trained()
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            assert_equal(trained(), first)
    finally:
        torch.set_num_threads(threads)


def test_compiled_step() -> None:
    """torch.compile traces the plain-torch reference and gives the same trajectory."""
    optimizers = [bigops.optim.AdamW(parameters(), max_grad_norm=1.0) for _ in range(2)]
    run(optimizers[0], steps=range(3))
    step = torch.compile(optimizers[1].step, backend="aot_eager")
    params = optimizers[1].param_groups[0]["params"]
    for i in range(3):
        set_gradients(params, i, torch.float32)
        step()
    for (name, a), b in zip(
        tensors(optimizers[0]).items(), tensors(optimizers[1]).values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


def test_training_converges_as_torchs() -> None:
    x = torch.randn(200, 10)
    y = x @ torch.randn(10, 1) + 0.1 * torch.randn(200, 1)
    losses = []
    for cls in CLASSES["AdamW"]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )
        optimizer = cls(model.parameters(), lr=0.02)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.1
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
