"""The road of a call: explain, forced backends, fallback and its warning, environment."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import bigops
from bigops.ops import dispatch


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, 2, 6, 8).unbind()


@pytest.fixture
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())


def slopes() -> torch.Tensor:
    """Whose gradient no fast backend has."""
    return torch.tensor([0.5, 0.25]).requires_grad_()


def test_explain_names_backend_and_reasons(qkv: tuple[torch.Tensor, ...]) -> None:
    found = bigops.explain(bigops.attention, *qkv, causal=True)
    assert found.backend == "native"
    assert found.op == "attention"
    assert [name for name, _ in found.passed_over] == ["triton"]
    assert "native" in str(found)


def test_explain_does_not_run(
    qkv: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigops.ops.get("attention"), "call", None)
    assert bigops.explain(bigops.attention, *qkv).backend == "native"


def test_explain_a_fallback(qkv: tuple[torch.Tensor, ...]) -> None:
    found = bigops.explain(bigops.attention, *qkv, alibi_slopes=slopes())
    assert found.backend == "reference"
    assert "alibi_slopes" in dict(found.passed_over)["native"]


def test_explain_wants_a_function_of_ours() -> None:
    with pytest.raises(TypeError, match="function"):
        bigops.explain(torch.relu, torch.ones(1))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'cuda'"):
        bigops.use_backend("cuda").__enter__()


def test_forced_backend_that_does_not_apply(qkv: tuple[torch.Tensor, ...]) -> None:
    with bigops.use_backend("triton"), pytest.raises(bigops.BackendError, match="TRITON_INTERPRET"):
        bigops.attention(*qkv)


def test_use_backend_restores_after_an_error() -> None:
    with pytest.raises(KeyError), bigops.use_backend("reference"):
        raise KeyError
    assert dispatch._forced is None


@pytest.mark.usefixtures("_forget_warnings")
def test_fallback_warns_once_with_its_memory(qkv: tuple[torch.Tensor, ...]) -> None:
    with pytest.warns(bigops.FallbackWarning, match=r"runs the reference.*MiB.*alibi_slopes"):
        bigops.attention(*qkv, alibi_slopes=slopes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bigops.attention(*qkv, alibi_slopes=slopes())


@pytest.mark.usefixtures("_forget_warnings")
def test_fallback_keeps_the_meaning(qkv: tuple[torch.Tensor, ...]) -> None:
    query, key, value = qkv
    with pytest.warns(bigops.FallbackWarning):
        got = bigops.attention(query, key, value, alibi_slopes=slopes())
    i, j = torch.arange(6).unsqueeze(1), torch.arange(6)
    added = -slopes().detach().view(-1, 1, 1) * (i - j).abs()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=added)
    torch.testing.assert_close(got, expected)


def test_strict_raises(qkv: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_strict", True)
    with pytest.raises(bigops.BackendError, match="alibi_slopes"):
        bigops.attention(*qkv, alibi_slopes=slopes())


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_forces_a_backend() -> None:
    code = (
        "import bigops, torch; q = torch.ones(1, 1, 2, 4)\n"
        "print(bigops.explain(bigops.attention, q, q, q).backend)"
    )
    assert run(code, BIGOPS_BACKEND="reference").stdout.strip() == "reference"
    assert "BIGOPS_BACKEND must be one of" in run(code, BIGOPS_BACKEND="fast").stderr


def test_lesser_instruction_sets_agree() -> None:
    """Each instruction set this machine has is a build of its own and computes the same."""
    code = (
        "import bigops, torch; torch.manual_seed(0)\n"
        "q, k, v = torch.randn(3, 1, 2, 70, 40).unbind()\n"
        "out = bigops.attention(q, k, v, causal=True)\n"
        "with bigops.use_backend('reference'):\n"
        "    want = bigops.attention(q.double(), k.double(), v.double(), causal=True)\n"
        "assert (out - want).abs().max() < 2e-6\n"
        "from bigops.backends import native; print(native.ISA)"
    )
    from bigops.backends import native

    for isa in native.SUPPORTED:
        done = run(code, BIGOPS_CPU_ISA=isa)
        assert done.stdout.strip() == isa, done.stderr
    assert "BIGOPS_CPU_ISA must be one of" in run(code, BIGOPS_CPU_ISA="v9").stderr


def test_a_direct_call_of_the_torch_op_has_gradients(qkv: tuple[torch.Tensor, ...]) -> None:
    query, key, value = (t.requires_grad_() for t in qkv)
    out, _ = torch.ops.bigops.attention(
        query, key, value, *(None,) * 7, -1, -1, False, 0.5, 0.0, 0.0
    )
    got = torch.autograd.grad(out.sum(), (query, key, value))
    with bigops.use_backend("reference"):
        out = bigops.attention(query, key, value, scale=0.5)
        expected = torch.autograd.grad(out.sum(), (query, key, value))
    torch.testing.assert_close(got, expected)


def test_profiler_sees_the_op(qkv: tuple[torch.Tensor, ...]) -> None:
    with torch.profiler.profile() as profile:
        bigops.attention(*qkv)
    assert any(event.key == "bigops::attention" for event in profile.key_averages())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"query must have 4 dimensions"),
        (lambda q, k, v: (q, k.half(), v), r"key must have query's dtype"),
        (lambda q, k, v: (q, k, v.to("meta")), r"value must be on query's device"),
        (lambda q, k, v: (q, k[..., :4], v), r"key must have query's head size 8, got 4"),
        (lambda q, k, v: (q, k[:, :, :3], v), r"value must have key's length"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), r"query must be floating"),
        (lambda q, k, v: (q[:, :1], k, v), r"key must have a number of heads that divides"),
        (
            lambda q, k, v: (q, k.repeat(2, 1, 1, 1), v),
            r"key must have query's batch size 1, got 2",
        ),
    ],
)
def test_bad_attention(qkv: tuple[torch.Tensor, ...], change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match=message):
        bigops.attention(*change(*qkv))


def test_bad_attention_keywords(qkv: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match=r"bias must be broadcastable to \(1, 2, 6, 6\)"):
        bigops.attention(*qkv, bias=torch.zeros(5, 6))
    with pytest.raises(ValueError, match="bias must be bool, float32"):
        bigops.attention(*qkv, bias=torch.zeros(6, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="dropout_p"):
        bigops.attention(*qkv, dropout_p=1.5)
    with pytest.raises(ValueError, match="softcap"):
        bigops.attention(*qkv, softcap=float("nan"))
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor"):
        bigops.attention([1.0], *qkv[1:])
    with pytest.raises(RuntimeError, match="attn_mask must be None"):
        bigops.scaled_dot_product_attention(
            *qkv, attn_mask=torch.ones(6, 6, dtype=torch.bool), is_causal=True
        )


@pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8), (3, 2, 6, 8), (2, 2, 3, 6, 8)])
def test_sdpa_takes_torchs_shapes(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, *shape).unbind()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = bigops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)
    if len(shape) < 3:
        return
    mask = torch.rand(*shape[:-1], shape[-2]) < 0.8
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(bigops.scaled_dot_product_attention(q, k, v, attn_mask=mask), want)


def test_autocast_gives_torchs_dtype(qkv: tuple[torch.Tensor, ...]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = torch.nn.functional.scaled_dot_product_attention(*qkv)
        assert bigops.scaled_dot_product_attention(*qkv).dtype == want.dtype


def test_output_is_new_memory(qkv: tuple[torch.Tensor, ...]) -> None:
    out = bigops.attention(*qkv)
    assert out.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in qkv}
