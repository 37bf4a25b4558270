"""attention in float32 by bf16 products, as AMX computes long sequences: the error rule over the
features, and which sequences take that way. What it does not take is computed by FMA, as on
processors without AMX (the module _native_v4)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops import check
from bigops.backends import native
from bigops.ops import Sample

pytestmark = [
    # Without AMX nothing is split: what FMA does is the other tests' of attention.
    pytest.mark.skipif(
        native.ISA != "v4_amx", reason=f"only v4_amx splits, the kernels here are {native.ISA}'s"
    ),
    pytest.mark.usefixtures("native_kernels"),
]
OP = bigops.ops.get("attention")
Inputs = list[Tensor]


@pytest.fixture
def native_kernels() -> Any:
    with bigops.use_backend("native"):
        yield


def inputs(
    batch: int, heads: int, kv_heads: int, rows: int, columns: int, size: int, value_size: int
) -> Inputs:
    return [
        torch.randn(batch, heads, rows, size, requires_grad=True),
        torch.randn(batch, kv_heads, columns, size, requires_grad=True),
        torch.randn(batch, kv_heads, columns, value_size, requires_grad=True),
    ]


def results(tensors: Inputs, grad: Tensor | None = None, **kwargs: Any) -> Inputs:
    """Out, lse and the gradients of query, key and value."""
    out, lse = bigops.attention(*tensors, **kwargs | {"return_lse": True})
    grad = torch.ones_like(out) if grad is None else grad
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, tensors, grad)]


@contextmanager
def kernels_without_amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(native, "kernels", importlib.import_module("bigops._native_v4"))
        yield


def by_fma(monkeypatch: pytest.MonkeyPatch, tensors: Inputs, **kwargs: Any) -> Inputs:
    with kernels_without_amx(monkeypatch):
        return results(tensors, **kwargs)


def same_bits(got: Inputs, want: Inputs) -> list[bool]:
    as_bits = [[t.contiguous().view(torch.int32) for t in tensors] for tensors in (got, want)]
    return [torch.equal(a, b) for a, b in zip(*as_bits, strict=True)]


# Name: sizes as of `inputs`, keyword arguments as of the call. "learned" ones get gradients.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "full": ((2, 2, 2, 520, 530, 64, 64), {}),
    "causal": ((1, 2, 2, 1030, 1030, 64, 64), {"causal": True}),
    "odd sizes": ((1, 2, 2, 700, 750, 65, 51), {}),
    "small heads": ((1, 2, 2, 1025, 1040, 33, 32), {}),
    "wide heads": ((1, 1, 1, 450, 410, 192, 128), {}),
    "widest": ((1, 1, 1, 430, 440, 256, 256), {}),
    "sums of many keys": ((1, 1, 1, 410, 5000, 80, 80), {}),
    "sums of many queries": ((1, 1, 1, 5000, 410, 80, 80), {}),
    "window": ((1, 2, 2, 1200, 1200, 64, 64), {"window_size": (500, 100)}),
    "more keys": ((1, 2, 2, 1000, 1300, 64, 64), {"causal": True}),
    "unseen rows": ((1, 1, 1, 1250, 1150, 64, 64), {"causal": True}),
    "shared keys": ((1, 4, 1, 520, 530, 64, 64), {}),
    "scale": ((1, 2, 2, 520, 520, 64, 64), {"scale": -0.3}),
    "no scale": ((1, 2, 2, 520, 520, 64, 64), {"scale": 0.0}),
    "softcap": ((1, 2, 2, 520, 520, 64, 64), {"softcap": 2.0}),
    "alibi": ((1, 2, 2, 520, 520, 64, 64), {"alibi_slopes": (2,)}),
    "bool mask": ((1, 2, 2, 520, 520, 64, 64), {"bias": "bool"}),
    "bias": ((1, 2, 2, 520, 520, 64, 64), {"bias": (1, 1, 520, 520)}),
    "learned bias of keys": ((1, 2, 2, 520, 520, 64, 64), {"bias": "learned"}),
    "learned bias": ((1, 2, 2, 520, 520, 64, 64), {"bias": "learned in full"}),
    "learned sinks": ((1, 2, 2, 520, 520, 64, 64), {"sinks": "learned"}),
    "dropout": ((1, 2, 2, 520, 520, 64, 64), {"dropout_p": 0.3}),
    "everything": (
        (2, 4, 2, 1000, 1040, 72, 64),
        {
            "causal": True,
            "window_size": (700, -1),
            "softcap": 4.0,
            "alibi_slopes": (2, 4),
            "bias": "learned",
            "sinks": "learned",
            "dropout_p": 0.1,
        },
    ),
}


def sample(name: str) -> Sample:
    sizes, options = CASES[name]

    def make(device: str, dtype: torch.dtype) -> check.Call:
        batch, heads, _, rows, columns, *_ = sizes
        kwargs = dict(options, return_lse=True)
        if "alibi_slopes" in kwargs:
            kwargs["alibi_slopes"] = 0.1 * torch.rand(kwargs["alibi_slopes"])
        if kwargs.get("sinks"):
            kwargs["sinks"] = torch.randn(heads, dtype=dtype, requires_grad=True)
        bias = kwargs.get("bias")
        if bias == "bool":
            kwargs["bias"] = torch.rand(batch, 1, rows, columns) < 0.5
        elif isinstance(bias, tuple):
            kwargs["bias"] = torch.randn(bias, dtype=dtype)
        elif bias:
            shape = (batch, heads, rows, columns) if "full" in bias else (1, heads, 1, columns)
            kwargs["bias"] = torch.randn(shape, dtype=dtype, requires_grad=True)
        return tuple(t.detach().to(dtype).requires_grad_() for t in inputs(*sizes)), kwargs

    return Sample(name, make, bench=True)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", CASES)
def test_truth(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    call, kwargs = sample(name).make("cpu", torch.float32)
    torch.manual_seed(0)
    out, _ = bigops.attention(*call, **kwargs)
    torch.manual_seed(0)
    assert not torch.equal(out, by_fma(monkeypatch, list(call), **kwargs)[0]), "is not split"
    for found in check.check_arbitrary(OP, sample(name), "native", torch.float32, "cpu"):
        assert found.ok, found


@pytest.mark.parametrize(
    ("rows", "columns", "size", "options", "splits"),
    [
        (520, 520, 64, {}, True),
        (520, 520, 31, {}, False),
        (520, 390, 64, {}, False),
        (390, 520, 64, {}, False),
        (1030, 1030, 64, {"causal": True}, True),
        (520, 520, 64, {"causal": True}, False),
        (2000, 2000, 64, {"window_size": (100, 100)}, False),
    ],
)
def test_long_sequences_are_split(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    columns: int,
    size: int,
    options: dict[str, Any],
    splits: bool,
) -> None:
    tensors = inputs(1, 2, 2, rows, columns, size, size)
    same = same_bits(results(tensors, **options), by_fma(monkeypatch, tensors, **options))
    assert any(same) != splits


def test_three_parts_hold_all_bits() -> None:
    """Where a row sees one key, out is that key's value to the last bit."""
    query, key, value = inputs(1, 2, 2, 600, 600, 64, 64)
    order = torch.randperm(600)
    mask = torch.zeros(600, 600, dtype=torch.bool).scatter(1, order[:, None], True)
    out = bigops.attention(query, key, value, bias=mask)
    assert torch.equal(out, value[:, :, order])


def test_errors_are_below_eagers() -> None:
    """README's word: the RMS of out's error is about half, that of a gradient's not more."""
    tensors = inputs(1, 2, 2, 1024, 1024, 64, 64)
    grad = torch.randn(1, 2, 1024, 64)

    def errors(got: Inputs) -> list[float]:
        off = [(a - b).square().mean().sqrt().item() for a, b in zip(got, want, strict=True)]
        return [off[0], *off[2:]]

    with bigops.use_backend("reference"):
        want = results([t.detach().double().requires_grad_() for t in tensors], grad.double())
        eager = errors(results(tensors, grad))
    out, *gradients = (a / b for a, b in zip(errors(results(tensors, grad)), eager, strict=True))
    assert out < 0.6
    assert max(gradients) < 1.0


def test_errors_do_not_grow_with_the_number_of_keys() -> None:
    def error(keys: int) -> float:
        tensors = [t.detach() for t in inputs(1, 1, 1, 520, keys, 64, 64)]
        with bigops.use_backend("reference"):
            want = bigops.attention(*(t.double() for t in tensors))
        off = bigops.attention(*tensors) - want
        return (off.square().mean() / want.square().mean()).sqrt().item()

    assert error(30_000) < 2 * error(520)


def test_any_layout() -> None:
    """Rows and elements anywhere, a gradient that is one number, as sum() makes it."""
    plain = inputs(1, 2, 2, 520, 520, 64, 64)
    strided = [
        torch.zeros(520, 2, 64, 2)[..., 0].permute(1, 0, 2)[None].copy_(t.detach()) for t in plain
    ]
    strided = [t.requires_grad_() for t in strided]
    assert strided[0].stride(-1) == 2
    one = torch.ones(()).expand(1, 2, 520, 64)
    assert all(same_bits(results(strided, one), results(plain)))


LENGTHS = ((600, 600), (100, 90), (0, 0), (513, 700), (700, 0))


def test_each_sequence_of_a_call_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed with others, short and long, a sequence gets the bits that it gets alone."""
    starts = [torch.tensor([3, *(n[i] for n in LENGTHS)]).cumsum(0).int() for i in (0, 1)]
    rows, columns = (int(s[-1]) + 2 for s in starts)
    sizes = ((rows, 2, 64), (columns, 2, 64), (columns, 2, 64))
    packed = [torch.randn(size, requires_grad=True) for size in sizes]
    out, lse = bigops.varlen_attention(*packed, *starts, 700, 700, return_lse=True)
    grads = torch.autograd.grad(out, packed, torch.ones_like(out))
    for b, lengths in enumerate(LENGTHS):
        at, keys = (slice(int(s[b]), int(s[b + 1])) for s in starts)
        alone = [
            t.detach()[here].transpose(0, 1)[None].requires_grad_()
            for t, here in zip(packed, (at, keys, keys), strict=True)
        ]
        got = [
            out.detach()[at].transpose(0, 1)[None],
            lse.detach()[None, :, at],
            *(
                g[here].transpose(0, 1)[None]
                for g, here in zip(grads, (at, keys, keys), strict=True)
            ),
        ]
        assert all(same_bits(got, results(alone))), lengths
        if min(lengths) > 0:
            assert any(same_bits(got, by_fma(monkeypatch, alone))) == (max(lengths) < 512)
    for t in (out, *grads):
        assert not t[:3].any()
        assert not t[-2:].any()


@pytest.mark.parametrize("which", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 3.4e38, "tiny"], ids=str)
def test_numbers_out_of_range_are_not_split(
    monkeypatch: pytest.MonkeyPatch, number: float | str, which: str
) -> None:
    """A sequence with them is computed by FMA, and none beside it gets other bits."""
    tensors = inputs(2, 2, 2, 520, 520, 64, 64)
    grad = torch.randn(2, 2, 520, 64)
    before = results(tensors, grad)
    changed = dict(zip(("query", "key", "value", "grad"), [*tensors, grad], strict=True))[which]
    with torch.no_grad():
        if isinstance(number, str):
            changed[1] *= 1e-15
        else:
            changed[1, 1, 300, 5] = number
    after = results(tensors, grad)
    assert all(same_bits([t[:1] for t in after], [t[:1] for t in before]))
    fma = by_fma(monkeypatch, tensors, grad=grad)
    if which == "grad":  # forward was split: from FMA's out and lse backward has FMA's bits
        with kernels_without_amx(monkeypatch):
            out = bigops.attention(*tensors)
        after = [*fma[:2], *torch.autograd.grad(out, tensors, grad)]
    for got, want in zip(after, fma, strict=True):
        assert torch.equal(got[1].nan_to_num(7.0), want[1].nan_to_num(7.0))
