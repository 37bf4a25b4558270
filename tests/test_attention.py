"""attention's own promises: no quadratic memory, both cores for one head, rows that see nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bigops
from bigops import check


@pytest.fixture(autouse=True)
def _native() -> object:
    with bigops.use_backend("native"):
        yield


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


GROWTH = """
import resource, torch, bigops
q, k, v = torch.randn(3, 1, 1, {length}, 64).unbind()
for t in (q, k, v):
    t.requires_grad_()
small = [t[:, :, :128] for t in (q, k, v)]
bigops.attention(*small, causal=True).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bigops.attention(q, k, v, causal=True).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_linear() -> None:
    """8192 x 8192 scores in float32 would be 256 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(length=8192)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "BIGOPS_BACKEND": "native"},
    )
    assert float(done.stdout) < 64.0


# A loaded machine can make two threads look like one, never one like two: the first attempt that
# shows both at work is the proof, for each pass on its own.
ONE_HEAD = """
import os, torch, bigops
torch.set_num_threads(2)
leaves = [t.requires_grad_() for t in torch.randn(3, 1, 1, 2048, 64).unbind()]
ran = lambda t: int(open(f"/proc/self/task/{t}/schedstat").read().split()[0])
tasks = lambda: {t: ran(t) for t in os.listdir("/proc/self/task")}
def share(call):
    before = tasks()
    call()
    worked = sorted(now - before.get(t, 0) for t, now in tasks().items())
    return worked[-2] / worked[-1]
best = {"forward": 0.0, "backward": 0.0}
for attempt in range(20):
    out = bigops.attention(*leaves)
    grad = torch.ones_like(out)
    calls = {
        "forward": lambda: bigops.attention(*leaves),
        "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
    }
    best = {name: max(best[name], share(call)) for name, call in calls.items()}
    if min(best.values()) > 0.5:
        break
print(best)
assert min(best.values()) > 0.5, best
"""


# Two threads take turns on one processor: what each had of it says nothing then.
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor only")
@pytest.mark.alone
def test_one_head_runs_on_all_threads() -> None:
    """Work is cut by query and key blocks, so that batch x heads = 1 is no bottleneck.

    OpenMP threads spin at a region's end, which would hide idleness: they are told not to.
    """
    done = subprocess.run(
        [sys.executable, "-c", ONE_HEAD],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "BIGOPS_BACKEND": "native",
            "OMP_WAIT_POLICY": "passive",
            "GOMP_SPINCOUNT": "0",
        },
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "keys"), [(40, 10), (150, 9)])  # 150: whole blocks of rows
def test_rows_that_see_nothing(rows: int, keys: int, dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 1, 2, rows, 16, dtype=dtype).unbind()
    query, key, value = (t.requires_grad_() for t in (query, key[:, :, :keys], value[:, :, :keys]))
    out, lse = bigops.attention(query, key, value, causal=True, return_lse=True)
    blind = rows - keys
    assert (out[:, :, :blind] == 0).all()
    assert (lse[:, :, :blind] == float("-inf")).all()
    assert lse[:, :, blind:].isfinite().all()
    grads = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, :blind] == 0).all()


def test_mask_rows_of_false_and_minus_infinity() -> None:
    query, key, value = torch.randn(3, 1, 2, 20, 8).unbind()
    seen = torch.rand(20, 20) < 0.5
    seen[3] = False
    added = torch.zeros(20, 20).masked_fill(~seen, float("-inf"))
    out = bigops.attention(query, key, value, bias=seen)
    assert (out[:, :, 3] == 0).all()
    torch.testing.assert_close(bigops.attention(query, key, value, bias=added), out)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = (100.0 * torch.randn(3, 1, 1, 64, 32)).unbind()
    got = bigops.attention(query, key, value)
    want = torch.nn.functional.scaled_dot_product_attention(*wide(query, key, value))
    eager = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert check.compare("out", got, eager, want).ok


def test_backward_takes_the_scores_that_lse_was_summed_from() -> None:
    """A scale rounded into the query by one pass only makes a third more error, on the average."""
    ours, eager = 0.0, 0.0
    scale = 48**-0.5
    for _ in range(20):
        inputs = [torch.randn(1, 2, 32, size) for size in (48, 48, 32)]
        grad = torch.randn(1, 2, 32, 32)
        reference = _query_gradient(_plain, [t.double() for t in inputs], grad.double(), scale)
        for_eager = _query_gradient(_plain, inputs, grad, scale)
        for_ours = _query_gradient(bigops.attention, inputs, grad, scale)
        eager += (for_eager - reference).abs().max().item()
        ours += (for_ours - reference).abs().max().item()
    assert ours < 1.15 * eager


@pytest.mark.parametrize("biased", [False, True])
def test_weight_of_a_single_key_is_one(biased: bool) -> None:
    """In backward too, where it is exp(score - lse): to the last bit, whatever the score."""
    query, key = (8 * torch.randn(64, 4, 1, 32) for _ in "qk")
    value, grad = torch.randn(2, 64, 4, 1, 16)
    bias = torch.randn(64, 4, 1, 1) if biased else None
    value.requires_grad_()
    out = bigops.attention(query, key, value, scale=0.5, bias=bias)
    assert torch.equal(out, value)
    assert torch.equal(torch.autograd.grad(out, value, grad)[0], grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scale_of_any_sign(scale: float, masked: bool) -> None:
    query, key, value = (torch.randn(1, 2, length, 16) for length in (7, 9, 9))
    bias = torch.randn(7, 9) if masked else None
    got = bigops.attention(query, key, value, scale=scale, bias=bias)
    want = _plain(*wide(query, key, value), scale=scale, bias=bias)
    eager = _plain(query, key, value, scale=scale, bias=bias)
    assert check.compare("out", got, eager, want).ok


def _plain(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None
) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    return torch.softmax(scores if bias is None else scores + bias, -1) @ value


def _query_gradient(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, scale: float
) -> Tensor:
    query, key, value = (t.clone().requires_grad_() for t in inputs)
    return torch.autograd.grad(function(query, key, value, scale=scale), query, grad)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 2, 3, 200, 40, dtype=dtype).unbind()
    leaves = [t.requires_grad_() for t in (query, key, value)]

    def run() -> list[Tensor]:
        out = bigops.attention(*leaves, causal=True)
        return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_one_of_a_batch_equals_it_alone() -> None:
    query, key, value = torch.randn(3, 3, 2, 70, 24).unbind()
    together = bigops.attention(query, key, value, causal=True)
    alone = bigops.attention(query[1:2], key[1:2], value[1:2], causal=True)
    assert torch.equal(together[1:2], alone)


def test_only_needed_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigops.backends import native

    given: list[tuple[bool, ...]] = []
    real = native.kernels.attention_backward

    def spy(*args: object) -> None:
        given.append(tuple(a is not None for a in args[-5:]))
        real(*args)

    monkeypatch.setattr(native.kernels, "attention_backward", spy)
    query, key, value = torch.randn(3, 1, 2, 9, 8).unbind()
    key.requires_grad_()
    bigops.attention(query, key, value).sum().backward()
    assert given == [(False, True, False, False, False)]
    assert query.grad is None


def test_lse_is_differentiable() -> None:
    query, key, value = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64).unbind()
    leaves = (query.requires_grad_(), key.requires_grad_(), value)
    assert torch.autograd.gradcheck(
        lambda q, k, v: bigops.attention(q, k, v, causal=True, return_lse=True)[1], leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 15, 16, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("head_size", [1, 31, 64, 100])
def test_tile_borders(dtype: torch.dtype, rows: int, head_size: int) -> None:
    query, key, value = torch.randn(3, 1, 2, 130, head_size, dtype=dtype).unbind()
    query = query[:, :, :rows]
    for causal in (False, True):
        got = bigops.attention(query, key, value, causal=causal)
        with bigops.use_backend("reference"):
            eager = bigops.attention(query, key, value, causal=causal)
            want = bigops.attention(*wide(query, key, value), causal=causal)
        assert check.compare("out", got, eager, want).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [1, 33, 100, 256])
def test_a_row_of_one_key_has_no_gradient(head_size: int, dtype: torch.dtype) -> None:
    """The two sums whose difference it is agree in bits, if scaling the score has not rounded."""
    query, key, value = torch.randn(3, 2, 3, 70, head_size, dtype=dtype).unbind()
    query.requires_grad_()
    out = bigops.attention(query, key, value, causal=True, scale=0.25)
    out.backward(torch.randn_like(out))
    assert query.grad is not None
    assert not query.grad[:, :, 0].any()
    assert query.grad[:, :, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_wanted_of_sinks_changes_no_other_gradient(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 2, 3, 70, 24, dtype=dtype).unbind()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    found = []
    for wanted in (False, True):
        sinks = torch.linspace(-1.0, 2.0, 3).requires_grad_(wanted)
        out = bigops.attention(*leaves, causal=True, sinks=sinks)
        found.append(torch.autograd.grad(out, leaves, out.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def one_key_and_a_sink() -> check.Comparison:
    """query's gradient where nearly all weight is on one key: a difference of two sums, of which
    one comes from the output as float16 rounds it, unless it is made anew."""
    query, value = torch.randn(2, 1, 2, 40, 1, dtype=torch.float16).unbind()
    out_grad, sinks = torch.randn_like(value), torch.tensor([-6.0, -7.0])

    def gradient(query: Tensor, value: Tensor) -> Tensor:
        query = query.detach().requires_grad_()
        out = bigops.attention(
            query, query.detach(), value, window_size=(0, 0), sinks=sinks.to(value.dtype)
        )
        return torch.autograd.grad(out, query, out_grad.to(out.dtype))[0]

    got = gradient(query, value)
    with bigops.use_backend("reference"):
        rounded = gradient(query.float(), value.float()).half()
        want = gradient(query.double(), value.double())
    return check.compare("grad", got, rounded, want)


def test_a_row_of_one_key_and_a_sink() -> None:
    assert (found := one_key_and_a_sink()).ok, found


def test_dropout_has_the_same_bits_on_every_instruction_set() -> None:
    """Where value is the identity and all scores are equal, out says which weights are left."""
    import importlib

    from bigops.backends import native
    from bigops.reference import philox

    rows, keys = 70, 100
    query, key = torch.zeros(2, 3, rows, 8), torch.zeros(2, 3, keys, 8)
    value = torch.eye(keys).expand(2, 3, keys, keys)
    seed = torch.tensor([-123456789012345])
    wanted = philox.attention_keeps(seed, 2, 3, rows, keys, 0.3)
    for isa in native.SUPPORTED:
        kernels = importlib.import_module(f"bigops._native_{isa}")
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tensors = [t.to(dtype) for t in (query, key, value)]
            out = torch.empty(2, 3, rows, keys, dtype=dtype)
            lse = torch.empty(2, 3, rows, dtype=torch.promote_types(dtype, torch.float32))
            kernels.attention_forward(
                *tensors, None, None, None, seed, None, None, out, lse, -1, -1, False, 1.0, 0.0, 0.3
            )
            assert torch.equal(out != 0, wanted), (isa, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_exact_to_four_ulp(dtype: torch.dtype) -> None:
    """A single key's score is lse, which a softcap of 1 makes the tanh of the product."""
    x = torch.cat([torch.randn(20000), 10 * torch.randn(20000), 1e-3 * torch.randn(20000)])
    x = torch.cat([x, torch.tensor([0.0, 1e-30, 9.0, 9.2, 20.0, 1e4, -1e4])]).to(dtype)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    query = x.view(1, 1, -1, 1)
    _, lse = bigops.attention(query, one, one, scale=1.0, softcap=1.0, return_lse=True)
    # float64's own is off by an ulp at most.
    want = torch.tanh(x.double())
    spacing = torch.finfo(dtype).eps * torch.exp2(want.abs().clamp_min(1e-300).log2().floor())
    assert ((lse.flatten().double() - want).abs() <= 4 * spacing + 1e-300).all()


def test_compiled_call_takes_other_numbers() -> None:
    """Dynamo traces a number as a symbol once it has seen it change."""
    query = torch.randn(1, 2, 6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(bigops.attention, fullgraph=True, backend="eager")
    for softcap, scale in ((0.0, 1.0), (2.0, 0.5), (3.0, 0.25), (0.0, 0.3)):
        numbers = {"softcap": softcap, "scale": scale}
        want = bigops.attention(query, query, query, **numbers)
        assert torch.equal(compiled(query, query, query, **numbers), want)


def test_compiled_call_takes_other_shapes() -> None:
    """Those it has met become symbols, beside the numbers of arguments it has not."""
    torch._dynamo.reset()
    compiled = torch.compile(bigops.attention, fullgraph=True, backend="eager")
    for batch, heads, rows, columns in ((1, 2, 6, 5), (2, 4, 9, 8), (3, 6, 12, 16)):
        query = torch.randn(batch, heads, rows, 8)
        key, value = torch.randn(2, batch, heads // 2, columns, 8).unbind()
        kwargs = {
            "alibi_slopes": torch.rand(batch, heads),
            "bias": torch.randn(heads, rows, columns),
            "sinks": torch.randn(heads),
        }
        kwargs = kwargs if batch > 1 else {}
        want = bigops.attention(query, key, value, **kwargs)
        assert torch.equal(compiled(query, key, value, **kwargs), want)
