"""Rung 7: attention's CUDA C++ kernels on a GPU: every case that the CPU model judges, and what
only a GPU has: streams, graphs, many blocks at once. `pytest -m gpu tests/test_gpu_attention.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attention_cuda import PACKED, Case, cases, forward, inputs, options, starts
from attention_cuda_backward import gradients
from torch import Tensor

import bigops
from bigops.backends import cuda
from bigops.check import Comparison, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not())),
]


# Rows and keys of a tile by head size, so that cases cross their borders: csrc/cuda.
FORWARD = {
    "sm90": {64: (192, 128), 96: (128, 128), 128: (128, 128), 256: (128, 80)},
    "sm80": {64: (128, 64), 96: (128, 64), 128: (128, 64), 256: (128, 64)},
}
BACKWARD = {
    "sm90": {64: (128, 128), 96: (64, 128), 128: (64, 128), 256: (64, 64)},
    "sm80": {64: (64, 128), 96: (64, 128), 128: (64, 128), 256: (32, 64)},
}
families = pytest.mark.parametrize("family", ["sm90", "sm80"])


def each(tiles: dict[str, dict[int, tuple[int, int]]], least_keys: int) -> Any:
    found = [
        pytest.param(family, case, id=f"{family} {case}")
        for family, sizes in tiles.items()
        for size, tile in sizes.items()
        for case in cases(size, *tile)
        if case.keys >= least_keys
    ]
    return pytest.mark.parametrize(("family", "case"), found)


def need(family: str) -> None:
    if family == "sm90" and cuda.capability(torch.device("cuda")) != (9, 0):
        pytest.skip("wgmma is Hopper's alone")


def packed(starts_q: Tensor | None, starts_k: Tensor | None, max_q: int, max_k: int) -> Any:
    return None if starts_q is None else (starts_q, starts_k, max_q, max_k)


def run_forward(family: str, *args: Any) -> None:
    tensors, bounds, lengths = args[:5], args[5:10], args[10:]
    kernels = cuda.kernels()
    workspace = torch.empty(kernels.FORWARD_WORKSPACE, dtype=torch.uint8, device="cuda")
    run = getattr(kernels, f"attention_forward_{family}")
    run(*tensors, *bounds, packed(*lengths), workspace)


def run_backward(
    family: str, case: Case, *, lse_used: bool = False, deterministic: bool = False
) -> tuple[list[Comparison], list[Tensor]]:
    """Gradients compared; fresh memory is NaN, so what is not written is seen."""
    leaves = inputs(case, "cuda")
    query, key, _ = leaves
    grad_out = torch.randn_like(query.transpose(1, 2)).transpose(1, 2)
    grad_lse = torch.randn(query.shape[:3], device="cuda") if lse_used else None
    out, lse, want = gradients(case, leaves, grad_out, grad_lse, torch.float64)
    _, _, eager = gradients(case, leaves, grad_out, grad_lse, case.dtype)
    saved = torch.empty_like(query).copy_(out), lse.float()
    got = [torch.full_like(t, float("nan")) for t in leaves]
    kernels, lengths = cuda.kernels(), packed(*starts(case, "cuda"))
    name = f"attention_backward_{family}"
    size = getattr(kernels, f"{name}_workspace")(query, key, lengths)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    getattr(kernels, name)(
        grad_out, *leaves, *saved, grad_lse, *got, *options(case, query, key), deterministic,
        lengths, workspace,
    )  # fmt: skip
    names = ("grad_query", "grad_key", "grad_value")
    return [compare(*four) for four in zip(names, got, eager, want, strict=True)], got


@each(FORWARD, least_keys=1)
def test_forward(family: str, case: Case) -> None:
    need(family)
    judged, _, _ = forward(case, functools.partial(run_forward, family), "cuda")
    assert all(c.ok for c in judged), judged


@each(BACKWARD, least_keys=2)  # a single one weighs 1: what is left are rounding errors
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward(family: str, case: Case, deterministic: bool) -> None:
    need(family)
    judged, _ = run_backward(family, case, deterministic=deterministic)
    assert all(c.ok for c in judged), judged


@families
def test_lse_has_a_gradient(family: str) -> None:
    need(family)
    for size in BACKWARD[family]:
        case = Case(queries=150, keys=100, size=size, causal=True)
        judged, _ = run_backward(family, case, lse_used=True)
        assert all(c.ok for c in judged), judged


@families
@pytest.mark.parametrize("size", FORWARD["sm90"])
def test_two_runs_give_the_same_bits(family: str, size: int) -> None:
    """More tiles than the GPU holds at once, of unequal work."""
    need(family)
    many = Case(4, 16, 4, 1500, 1500, size, causal=True)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        query, key, value = inputs(many, "cuda")
        out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device="cuda")
        bounds = options(many, query, key)
        run_forward(family, query, key, value, out, lse, *bounds, None, None, 0, 0)
        torch.manual_seed(0)
        few = Case(2, 4, 2, 400, 400, size, lengths=PACKED, causal=True)
        _, grads = run_backward(family, few, deterministic=True)
        found.append([out, lse, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with bigops.use_backend("native"):
        return bigops.attention(query, key, value, causal=True, deterministic=True)


def test_explain_says_which_kernels_are_proven() -> None:
    t = draw(1, 1, 64, 64)
    proven = ("attention", cuda.capability(t.device)) in cuda.PROVEN
    found = bigops.explain(bigops.attention, t, t, t)
    assert found.backend == ("native" if proven else "triton")
    assert proven or "unproven" in dict(found.passed_over)["native"]
    with bigops.use_backend("native"):
        assert bigops.explain(bigops.attention, t, t, t).backend == "native"


def test_a_graph_replays_what_was_captured() -> None:
    """Inputs written anew, and other work in between: nothing is remembered of the capture."""
    static = [draw(2, 4, 500, 64).requires_grad_() for _ in range(3)]
    seed = draw(2, 4, 500, 64)

    def step() -> tuple[Tensor, ...]:
        out = op(*static)
        with bigops.use_backend("native"):
            return out, *torch.autograd.grad(out, static, seed)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in static:
                tensor.copy_(draw(*tensor.shape))
        op(draw(1, 2, 300, 128), draw(1, 2, 300, 128), draw(1, 2, 300, 128))
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_kernels_run_on_the_current_stream() -> None:
    """The input is ready late on a side stream, and nothing else orders the two."""
    big = torch.randn(8192, 8192, device="cuda")
    want = draw(1, 4, 256, 64)
    query = torch.full_like(want, float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(10):
            big = big @ big * 1e-4
        query.copy_(want)
        out = op(query, query, query)
    side.synchronize()
    assert torch.equal(out, op(want, want, want))


def test_the_current_device_stays_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("a single GPU")
    with torch.cuda.device(0):
        t = torch.randn(1, 2, 200, 64, device="cuda:1", dtype=torch.bfloat16)
        out = op(t, t, t)
        assert torch.cuda.current_device() == 0
    assert out.device == t.device
    assert torch.equal(out.cpu(), op(*[t.to("cuda:0")] * 3).cpu())


def test_layouts_that_rows_of_16_bytes_cannot_walk_are_copied() -> None:
    plain = draw(2, 3, 70, 64)
    want = op(plain, plain, plain)
    shifted = draw(plain.numel() + 1)[1:].view(plain.shape).copy_(plain)
    strided = draw(2, 3, 70, 128)[..., ::2].copy_(plain)
    odd = draw(2, 3, 70, 65)[..., :64].copy_(plain)
    turned = plain.transpose(2, 3).contiguous().transpose(2, 3)
    for tensor in (shifted, strided, odd, turned):
        assert torch.equal(op(tensor, tensor, tensor), want)
    lone = plain[:1].as_strided((1, 3, 70, 64), (1, 70 * 64, 64, 1))  # of one: any stride will do
    assert torch.equal(op(lone, lone, lone), want[:1])
    heads = draw(2, 1, 70, 64)
    assert torch.equal(op(plain, *[heads.expand(2, 3, 70, 64)] * 2), op(plain, heads, heads))


def test_nothing_to_see_and_nothing_to_do() -> None:
    query, none = draw(1, 2, 5, 64), draw(1, 2, 0, 64)
    assert torch.equal(op(query, none, none), torch.zeros_like(query))
    assert op(none, query, query).shape == none.shape


def test_errors_name_what_is_wrong() -> None:
    wrong = draw(1, 1, 8, 80)
    lse = torch.zeros(1, 1, 8, device="cuda")
    workspace = torch.zeros(16, dtype=torch.uint8, device="cuda")
    run = cuda.kernels().attention_forward_sm80
    with pytest.raises(ValueError, match="head sizes 64, 96, 128 and 256"):
        run(wrong, wrong, wrong, wrong, lse, 1.0, 0, -1, -1, 0.0, None, workspace)
    with pytest.raises(ValueError, match="different devices"):
        run(wrong, wrong, wrong, wrong, lse.cpu(), 1.0, 0, -1, -1, 0.0, None, workspace)
    with bigops.use_backend("native"), pytest.raises(bigops.BackendError, match="head sizes"):
        bigops.attention(wrong, wrong, wrong)
