"""bigops.nn.MultiheadAttention against torch's: same results, gradients, errors and state dicts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import assert_as_true, nudged

import bigops
from bigops import check

N, L, S, E, H = 2, 19, 26, 48, 4
INFINITY = float("inf")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim, vdim": {"kdim": 40, "vdim": 56},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv, zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
}


def hidden(*shape: int) -> Tensor:
    """True hides: a third of all keys, and all of them from the last row or sequence."""
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False
    mask.select(-2, -1).fill_(True)
    return mask


def causal(rows: int, keys: int, batch: int) -> Tensor:
    return torch.ones(rows, keys).triu(1).bool()


MASKS: dict[str, dict[str, Callable[[int, int, int], Tensor]]] = {
    "none": {},
    "padding": {"key_padding_mask": lambda rows, keys, batch: hidden(batch, keys)},
    "float padding": {"key_padding_mask": lambda rows, keys, batch: torch.randn(batch, keys)},
    "2-D": {"attn_mask": lambda rows, keys, batch: hidden(rows, keys)},
    "3-D": {"attn_mask": lambda rows, keys, batch: hidden(batch * H, rows, keys)},
    "float 2-D": {"attn_mask": lambda rows, keys, batch: torch.randn(rows, keys)},
    "float 3-D": {"attn_mask": lambda rows, keys, batch: torch.randn(batch * H, rows, keys)},
    "both": {
        "attn_mask": lambda rows, keys, batch: hidden(rows, keys),
        "key_padding_mask": lambda rows, keys, batch: hidden(batch, keys),
    },
    "both float": {
        "attn_mask": lambda rows, keys, batch: torch.randn(batch * H, rows, keys),
        "key_padding_mask": lambda rows, keys, batch: torch.randn(batch, keys),
    },
    "float and padding": {
        "attn_mask": lambda rows, keys, batch: torch.randn(rows, keys),
        "key_padding_mask": lambda rows, keys, batch: hidden(batch, keys),
    },
    "padding is float": {
        "attn_mask": lambda rows, keys, batch: hidden(rows, keys),
        "key_padding_mask": lambda rows, keys, batch: torch.randn(batch, keys),
    },
    "causal": {"attn_mask": causal},
    "causal and padding": {
        "attn_mask": causal,
        "key_padding_mask": lambda rows, keys, batch: hidden(batch, keys),
    },
}
LAYOUTS = ("batch first", "length first", "unbatched")
SHARED = ("self", "key is value", "three")


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Any other road than the kernels' is an error."""
    with bigops.use_backend("native"):
        yield


def pair(layout: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """bigops' module and torch's, of the same parameters."""
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=layout == "batch first", **options)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:  # biases begin as 0
            torch.nn.init.normal_(parameter)
    ours = bigops.nn.MultiheadAttention(E, H, batch_first=layout == "batch first", **options)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(layout: str, shared: str, module: Any, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value; leaves."""

    def draw(length: int, size: int) -> Tensor:
        shape = {"batch first": (N, length), "length first": (length, N), "unbatched": (length,)}
        return torch.randn(*shape[layout], size).to(dtype).requires_grad_()

    if shared == "self":
        return [draw(L, E)] * 3
    if shared == "key is value":
        return [draw(L, E), *[draw(S, E)] * 2]
    return [draw(L, E), draw(S, module.kdim), draw(S, module.vdim)]


def masks(kind: str, layout: str, shared: str) -> dict[str, Any]:
    keys = L if shared == "self" else S
    drawn = {name: draw(L, keys, 1 if layout == "unbatched" else N)
             for name, draw in MASKS[kind].items()}  # fmt: skip
    if layout == "unbatched" and "key_padding_mask" in drawn:
        drawn["key_padding_mask"] = drawn["key_padding_mask"][0]
        if drawn["key_padding_mask"].dtype == torch.bool:
            drawn["key_padding_mask"] = torch.arange(keys) % 3 == 1
    return drawn | {"is_causal": kind.startswith("causal")}


def run(
    module: Any,
    tensors: list[Tensor],
    given: dict[str, Any],
    change: Callable[[Tensor], Tensor] = Tensor.clone,
    of_masks: bool = False,
) -> dict[str, Tensor]:
    """Output and every gradient, of inputs and parameters or of masks, which are changed before."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = change(parameter.data)
    copies: dict[int, Tensor] = {}
    for t in tensors:
        copies[id(t)] = change(t.detach()).requires_grad_()
    for name, t in given.items():
        if isinstance(t, Tensor) and t.is_floating_point():
            given = given | {name: change(t).requires_grad_(of_masks)}
    out, weights = module(*(copies[id(t)] for t in tensors), need_weights=False, **given)
    assert weights is None
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
    leaves = {name: t for name, t in given.items() if isinstance(t, Tensor) and t.requires_grad}
    if not of_masks:
        names = ("query", "key", "value")
        leaves = dict(zip(names, (copies[id(t)] for t in tensors), strict=True))
        leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    named = zip(leaves, grads, strict=True)
    return {"out": out.detach()} | {f"grad of {n}": g for n, g in named if g is not None}


def judge(
    ours: Any,
    theirs: Any,
    layout: str,
    shared: str,
    kind: str,
    dtype: torch.dtype,
    of_masks: bool = False,
) -> None:
    """By the project's rule, torch's module in float64 being the truth."""
    calls = [(inputs(layout, shared, ours, dtype), masks(kind, layout, shared)) for _ in range(3)]

    def again(call: Any) -> Callable[[], dict[str, Tensor]]:
        return lambda: run(theirs, *call, nudged, of_masks)

    assert_as_true(
        [run(ours, *call, of_masks=of_masks) for call in calls],
        [run(theirs, *call, of_masks=of_masks) for call in calls],
        [run(theirs, *call, Tensor.double, of_masks) for call in calls],
        [again(call) for call in calls],
    )


def cases() -> Iterator[Any]:
    """Every mask with every layout, with every sharing, and with every option of the module."""
    for layout, shared, kind in itertools.product(LAYOUTS, SHARED, MASKS):
        if kind.startswith("causal") and shared != "self" and layout != "batch first":
            continue
        yield layout, shared, kind, "plain"
    for options, kind in itertools.product(list(OPTIONS)[1:], MASKS):
        shared = "three" if "kdim" in options else "self"
        yield "batch first", shared, kind, options


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "shared", "kind", "options"), list(cases()))
def test_forward_and_gradients(
    layout: str, shared: str, kind: str, options: str, dtype: torch.dtype
) -> None:
    ours, theirs = pair(layout, dtype, **OPTIONS[options])
    judge(ours, theirs, layout, shared, kind, dtype)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["plain", "bias_kv, zero_attn"])
@pytest.mark.parametrize("kind", [kind for kind in MASKS if "float" in kind])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_masks(layout: str, kind: str, options: str, dtype: torch.dtype) -> None:
    """These alone: where a mask requires a gradient torch saves the weights, and its other
    gradients are better than its, and bigops', usual ones."""
    ours, theirs = pair(layout, dtype, **OPTIONS[options])
    judge(ours, theirs, layout, "three", kind, dtype, of_masks=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["none", "2-D", "3-D", "both", "causal", "causal and padding"])
def test_inference(kind: str, layout: str) -> None:
    """Against torch's fast path; it says NaN of rows that see nothing, so that none is here."""
    ours, theirs = pair(layout, torch.float32)
    (x, *_) = inputs(layout, "self", ours, torch.float32)
    given = masks(kind, layout, "self")
    for mask in (m for m in given.values() if isinstance(m, Tensor)):
        mask[..., 0] = False
    with torch.no_grad():
        got = ours.eval()(x, x, x, need_weights=False, **given)[0]
        eager = theirs.eval()(x, x, x, need_weights=False, **given)[0]
        wide = x.double()
        want = theirs.double()(wide, wide, wide, need_weights=False, **given)[0]
    assert check.compare("out", got, eager, want).ok
    assert not got.requires_grad


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_torchs(layout: str, training: bool, average: bool) -> None:
    ours, theirs = (m.train(training) for m in pair(layout, torch.float32, dropout=0.2))
    tensors = inputs(layout, "three", ours, torch.float32)
    given = masks("float 2-D", layout, "three") | {"average_attn_weights": average}
    found = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        found.append(module(*tensors, **given))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_rows_that_see_nothing_give_the_bias() -> None:
    ours, _ = pair("batch first", torch.float32)
    x = torch.randn(N, L, E)
    hides = torch.tensor([[False], [True]]).expand(N, L)
    out = ours(x, x, x, key_padding_mask=hides, need_weights=False)[0]
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))


# Uniform weights over values that are the rows of an identity: out is what dropout left of them.
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_its_rate(p: float) -> None:
    size = 128
    ours = bigops.nn.MultiheadAttention(size, 1, dropout=p, bias=False, batch_first=True)
    with torch.no_grad():
        ours.in_proj_weight.copy_(torch.eye(size).repeat(3, 1)).narrow(0, 0, size).zero_()
        ours.out_proj.weight.copy_(torch.eye(size))
    x = torch.eye(size).expand(8, -1, -1)
    torch.manual_seed(3)
    out = ours(x, x, x, need_weights=False)[0]
    kept = out != 0
    rate, count = kept.double().mean().item(), kept.numel()
    assert abs(rate - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)
    dropped = round(65536 * p)
    torch.testing.assert_close(
        out[kept] * size, torch.full_like(out[kept], 65536 / (65536 - dropped))
    )
    torch.manual_seed(3)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], out)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], out)
    ours.eval()
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0] * size, torch.ones_like(x))


def test_dropout_is_the_same_in_backward() -> None:
    """out is linear in the values: its gradient times them is out."""
    ours, _ = pair("batch first", torch.float64, dropout=0.4, bias=False)
    query, value = torch.randn(2, N, L, E, dtype=torch.float64).unbind()
    value.requires_grad_()
    out = ours(query, query, value, need_weights=False)[0]
    (grad,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close((grad * value).sum(), out.sum())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dict(options: dict[str, Any]) -> None:
    """Interchangeable both ways, the constructor's draws included."""
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(3)
    ours = bigops.nn.MultiheadAttention(E, H, **options)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    for to, state in ((theirs, states[0]), (ours, states[1])):
        assert not any(to.load_state_dict(state))


@pytest.mark.parametrize("kind", ["none", "2-D", "causal", "causal and padding"])
def test_compiles_without_a_break(kind: str) -> None:
    ours, _ = pair("batch first", torch.float32)
    (x, *_) = inputs("batch first", "self", ours, torch.float32)
    given = masks(kind, "batch first", "self")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def run(module: Any) -> list[Tensor]:
        out = module(x, x, x, need_weights=False, **given)[0]
        return [out, *torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])]

    assert all(torch.equal(*both) for both in zip(run(compiled), run(ours), strict=True))


@pytest.mark.parametrize("kind", ["none", "float and padding", "causal and padding"])
@pytest.mark.parametrize("options", ["plain", "bias_kv, zero_attn"])
def test_autocast(kind: str, options: str) -> None:
    ours, theirs = pair("batch first", torch.float32, **OPTIONS[options])
    tensors = [t.detach() for t in inputs("batch first", "three", ours, torch.float32)]
    given = masks(kind, "batch first", "three")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(*tensors, need_weights=False, **given)[0]
        eager = theirs(*tensors, need_weights=False, **given)[0]
    given = {n: t.double() if n == "attn_mask" and t.is_floating_point() else t
             for n, t in given.items()}  # fmt: skip
    want = theirs.double()(*(t.double() for t in tensors), need_weights=False, **given)[0]
    assert got.dtype == eager.dtype == torch.bfloat16
    assert check.compare("out", got, eager, want).ok


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_projections_are_not_copied(layout: str) -> None:
    """Two products and the kernel are all that runs."""
    ours, _ = pair(layout, torch.float32)
    (x, *_) = inputs(layout, "self", ours, torch.float32)
    with torch.no_grad(), Operators() as seen:
        ours(x, x, x, need_weights=False)
    products = [n for n in seen.names if n in ("aten::addmm", "aten::linear", "aten::mm")]
    assert len(products) == 2
    assert set(seen.names) - set(products) <= {
        "bigops::attention", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view",
    }  # fmt: skip


def test_wrong_calls_are_torchs_to_refuse() -> None:
    ours, theirs = pair("batch first", torch.float32)
    x, short = torch.randn(N, L, E), torch.randn(N, L - 1, E)
    hides = torch.ones(L, L).bool()
    calls: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([x, x, short], {}),
        ([x[0], x, x], {}),
        ([x[None]] * 3, {}),
        ([x[..., :-1]] * 3, {}),
        ([x] * 3, {"is_causal": True}),
        ([x] * 3, {"attn_mask": hides[:-1]}),
        ([x] * 3, {"attn_mask": hides.expand(N * H + 1, -1, -1)}),
        ([x] * 3, {"attn_mask": hides.int()}),
        ([x] * 3, {"attn_mask": hides.double()}),
        ([x] * 3, {"key_padding_mask": hides}),
        ([x] * 3, {"key_padding_mask": torch.ones(N, L, 1).bool()}),
    ]
    for tensors, given in calls:
        raised = []
        for module in (ours, theirs):
            with pytest.raises((AssertionError, RuntimeError)) as error:
                module(*tensors, need_weights=False, **given)
            raised.append(
                AssertionError if isinstance(error.value, AssertionError) else RuntimeError
            )
        assert raised[0] == raised[1], (given, raised)


def test_nested_tensors_are_torchs() -> None:
    """Which takes them in inference only."""
    ours, theirs = (m.eval() for m in pair("batch first", torch.float32))
    nested = torch.nested.nested_tensor([torch.randn(5, E), torch.randn(9, E)])
    with torch.no_grad():
        both = [m(nested, nested, nested, need_weights=False)[0] for m in (ours, theirs)]
    assert all(torch.equal(*pair) for pair in zip(*(t.unbind() for t in both), strict=True))


def test_functions_are_where_torch_has_them() -> None:
    assert bigops.nn.functional.attention is bigops.attention
    assert set(bigops.functional.__all__) == set(bigops.nn.functional.__all__)
