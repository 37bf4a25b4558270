"""What attention's results must not depend on: packing, the batch beside it, the run; and what
dropout drops. On the native kernels here, on Triton's in an interpreted process."""

from __future__ import annotations

import math
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops import check
from bigops.reference import philox

INTERPRETER = runpy.run_path(str(Path(__file__).with_name("interpreter.py")))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "native"
REPEATS = 3 if INTERPRETED else 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with bigops.use_backend(BACKEND):
        yield


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_interpreted() -> None:
    """The same on Triton's interpreter."""
    print(INTERPRETER["session"](__file__, at_least=19).splitlines()[-1])


def all_features(batch: int, heads: int, rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Keyword arguments of a call with every feature; tensors are per batch where they may be."""
    return {
        "causal": True,
        "window_size": (50, -1),
        "softcap": 4.0,
        "alibi_slopes": 0.1 * torch.rand(batch, heads),
        "bias": torch.randn(batch, heads, rows, columns, dtype=dtype).requires_grad_(),
        "sinks": torch.randn(heads, dtype=dtype).requires_grad_(),
        "dropout_p": 0.2,
        "return_lse": True,
    }


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(out: Tensor, lse: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum that weighs every element of out and lse differently."""
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return list(torch.autograd.grad((out.float().sin().sum() + finite.cos().sum()), inputs))


@every_dtype
def test_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    inputs = leaves((2, 4, 70, 24), (2, 2, 90, 24), (2, 2, 90, 16), dtype=dtype)
    kwargs = all_features(2, 4, 70, 90, dtype)
    inputs_all = [*inputs, kwargs["bias"], kwargs["sinks"]]

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        out, lse = bigops.attention(*inputs, **kwargs, deterministic=True)
        return [out.detach(), lse.detach(), *gradients(out, lse, inputs_all)]

    first = run()
    for _ in range(REPEATS - 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@every_dtype
def test_one_of_a_batch_equals_it_alone(dtype: torch.dtype) -> None:
    """Without dropout, which counts the batch."""
    inputs = leaves((3, 4, 70, 24), (3, 2, 90, 24), (3, 2, 90, 16), dtype=dtype)
    kwargs = all_features(3, 4, 70, 90, dtype) | {"dropout_p": 0.0}
    together = bigops.attention(*inputs, **kwargs)
    own = {name: kwargs[name][:1] for name in ("alibi_slopes", "bias")}
    alone = bigops.attention(*(t[:1] for t in inputs), **kwargs | own)
    for whole, one in zip(together, alone, strict=True):
        assert torch.equal(whole[:1], one)


LENGTHS = ((33, 33), (7, 20), (64, 5), (1, 130))


@every_dtype
def test_packed_equals_padded(dtype: torch.dtype) -> None:
    """In out, lse and all gradients, dropout included: it counts within the sequence."""
    rows, columns = (sum(pair[i] for pair in LENGTHS) for i in (0, 1))
    longest = [max(pair[i] for pair in LENGTHS) for i in (0, 1)]
    packed = leaves((rows, 4, 24), (columns, 2, 24), (columns, 2, 16), dtype=dtype)
    kwargs = all_features(len(LENGTHS), 4, *longest, dtype)
    lengths = [[pair[i] for pair in LENGTHS] for i in (0, 1)]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in lengths]
    torch.manual_seed(3)
    out, lse = bigops.varlen_attention(*packed, *starts, *longest, **kwargs)
    got = gradients(out, lse, [*packed, kwargs["bias"], kwargs["sinks"]])

    # Each sequence alone, at its place in a batch whose other sequences are not looked at.
    sinks = torch.zeros(4)
    for b, (n, m) in enumerate(LENGTHS):
        parts = [
            t.detach()[slice(*starts[i][b : b + 2].tolist())]
            for t, i in zip(packed, (0, 1, 1), strict=True)
        ]
        padded = [
            torch.stack([*([torch.zeros_like(p)] * b), p]).transpose(1, 2).requires_grad_()
            for p in parts
        ]
        own = kwargs | {
            "alibi_slopes": kwargs["alibi_slopes"][: b + 1],
            "bias": kwargs["bias"].detach()[: b + 1, :, :n, :m].clone().requires_grad_(),
            "sinks": kwargs["sinks"].detach().clone().requires_grad_(),
        }
        torch.manual_seed(3)
        one, one_lse = bigops.attention(*padded, **own)
        wanted = gradients(one[b:], one_lse[b:], [*padded, own["bias"], own["sinks"]])
        places = slice(*starts[0][b : b + 2].tolist()), slice(*starts[1][b : b + 2].tolist())
        assert torch.equal(out[places[0]].transpose(0, 1), one[b])
        assert torch.equal(lse[:, places[0]], one_lse[b])
        for i in range(3):
            assert torch.equal(got[i][places[min(i, 1)]].transpose(0, 1), wanted[i][b])
        assert torch.equal(got[3][b, :, :n, :m], wanted[3][b])
        sinks += wanted[4].float()
    assert not any(
        got[3][b, :, n:].any() or got[3][b, :, :, m:].any() for b, (n, m) in enumerate(LENGTHS)
    )
    ulp = torch.finfo(dtype).eps * sinks.abs().max()
    assert (got[4].float() - sinks).abs().max() <= 4 * ulp


def test_split_and_combined_equals_whole() -> None:
    """Results over parts of the keys, as devices that share a sequence have them."""
    query, key, value = (
        t.detach() for t in leaves((2, 4, 60, 32), (2, 2, 300, 32), (2, 2, 300, 32))
    )
    parts = [
        bigops.attention(query, key[:, :, part], value[:, :, part], return_lse=True)
        for part in (slice(0, 100), slice(100, 101), slice(101, 300))
    ]
    out, lse = bigops.combine_attention([p[0] for p in parts], [p[1] for p in parts])
    whole, whole_lse = bigops.attention(query, key, value, return_lse=True)
    with bigops.use_backend("reference"):
        wide = (t.double() for t in (query, key, value))
        exact, exact_lse = bigops.attention(*wide, return_lse=True)
    for got, eager, wanted in ((out, whole, exact), (lse, whole_lse, exact_lse)):
        found = check.compare("combined", got, eager, wanted)
        assert found.ok, found


def test_lse_used_twice() -> None:
    """z-loss beside the output: both roads of the gradient come together."""
    inputs = leaves((1, 2, 40, 16), (1, 2, 50, 16), (1, 2, 50, 16))

    def loss(*tensors: Tensor) -> Tensor:
        out, lse = bigops.attention(*tensors, causal=True, return_lse=True)
        return out.square().sum() + lse.square().sum() + (lse.exp() * out[..., 0]).sum()

    got = torch.autograd.grad(loss(*inputs), inputs)
    by_func = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in inputs))
    with bigops.use_backend("reference"):
        eager = torch.autograd.grad(loss(*inputs), inputs)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        wanted = torch.autograd.grad(loss(*wide), wide)
    for ours, func, plain, exact in zip(got, by_func, eager, wanted, strict=True):
        assert torch.equal(ours, func)
        assert check.compare("gradient", ours, plain, exact).ok


def kept(p: float, heads: int, rows: int, columns: int, passes: str) -> tuple[Tensor, Tensor]:
    """Which weights a pass kept, read off values or gradients that are unit vectors; the seed."""
    query, key = torch.randn(2, heads, rows, 16), torch.randn(2, heads, columns, 16)
    value = torch.eye(columns).expand(2, heads, columns, columns).contiguous().requires_grad_()
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    torch.manual_seed(11)
    out = bigops.attention(query, key, value, scale=0.1, dropout_p=p)
    if passes == "forward":
        return out.detach() != 0.0, seed
    (grad,) = torch.autograd.grad(out, value, torch.eye(rows, columns).expand_as(out).contiguous())
    return grad.transpose(-1, -2) != 0.0, seed


@pytest.mark.parametrize("p", [0.1, 0.5, 2 / 3, 0.9])
def test_dropout_keeps_what_philox_says(p: float) -> None:
    """The same in forward and backward, of any seed, negative ones too."""
    for passes in ("forward", "backward"):
        size = 96 if passes == "forward" else 100
        found, seed = kept(p, 3, size, size, passes)
        wanted = philox.attention_keeps(seed, 2, 3, size, size, p)
        assert torch.equal(found, wanted)
        deviations = (found.float().mean() - (1 - p)) / math.sqrt(p * (1 - p) / found.numel())
        assert abs(deviations) < 4.0


def test_dropout_is_another_one_with_every_call() -> None:
    inputs = [t.detach() for t in leaves(*[(1, 2, 30, 16)] * 3)]
    first, second = (bigops.attention(*inputs, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_under_checkpointing() -> None:
    """A forward pass that is run again for its gradients draws the same bits."""
    from torch.utils.checkpoint import checkpoint

    inputs = leaves(*[(1, 2, 30, 16)] * 3)

    def run(*tensors: Tensor) -> Tensor:
        return bigops.attention(*tensors, dropout_p=0.5)

    torch.manual_seed(5)
    wanted = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    torch.manual_seed(5)
    got = torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="compiled code runs in the native process")
def test_compiled_equals_eager() -> None:
    """Every feature in one graph; dropout's seed is drawn in it."""
    inputs = leaves((2, 4, 70, 24), (2, 2, 90, 24), (2, 2, 90, 16))
    kwargs = all_features(2, 4, 70, 90, torch.float32)
    inputs_all = [*inputs, kwargs["bias"], kwargs["sinks"]]

    def run(function: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(7)
        out, lse = function(*inputs, **kwargs)
        return [out.detach(), lse.detach(), *gradients(out, lse, inputs_all)]

    compiled = torch.compile(bigops.attention, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(compiled), run(bigops.attention), strict=True):
        assert torch.equal(got, wanted)


def test_features_under_autocast() -> None:
    """Query, key and value become bfloat16; gradients come back in the parameters' dtypes."""
    inputs = leaves((2, 4, 70, 24), (2, 2, 90, 24), (2, 2, 90, 16))
    kwargs = all_features(2, 4, 70, 90, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = bigops.attention(*inputs, **kwargs)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    found = gradients(out, lse, [*inputs, kwargs["bias"], kwargs["sinks"]])
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found)


def test_gradients_of_bias_and_sinks_keep_float32s_digits() -> None:
    """Beside bfloat16 data too: a row's sums do not come from the output, which is rounded."""
    data = [torch.randn(1, 2, 40, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    given = [torch.randn(1, 2, 40, 40).requires_grad_(), torch.randn(2).requires_grad_()]
    grad_out = torch.randn(1, 2, 40, 32, dtype=torch.bfloat16)

    def gradients(data: list[torch.Tensor], given: list[torch.Tensor]) -> Any:
        out = bigops.attention(*data, bias=given[0], sinks=given[1])
        return torch.autograd.grad(out, given, grad_out.to(out.dtype))

    got = gradients(data, given)
    with bigops.use_backend("reference"):
        wide = [[t.detach().double().requires_grad_() for t in ts] for ts in (data, given)]
        want = gradients(*wide)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()  # bfloat16 rounds by 4e-3
