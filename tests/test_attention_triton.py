"""What is Triton's alone in attention: dropout's bits, blocks that are not visited, the same bits
in every run, float8. What it computes is checked with all other backends, in test_ops.py.

In interpreted processes of their own (tests/interpreter.py).
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch
from test_attention import one_key_and_a_sink
from torch import Tensor

import bigops
from bigops import check
from bigops.reference import philox
from bigops.reference.attention import attention as reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from bigops.kernels import attention as kernels  # noqa: E402
from bigops.kernels import hardware  # noqa: E402
from bigops.kernels.philox import dropout_terms, keep_mask  # noqa: E402

HERE = Path(__file__).resolve()
SESSION = runpy.run_path(str(HERE.with_name("interpreter.py")))["session"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
E4M3 = torch.float8_e4m3fn


@triton.jit
def keep_probe(
    seed_ptr, out_ptr, first, plane, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = 3 + tl.arange(0, ROWS)
    keep = keep_mask(tl.load(seed_ptr), rows, first, plane, threshold, COLUMNS)
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + offsets, keep.to(tl.int8))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


if INTERPRETED:

    @pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99999, 1.0])
    @pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
    def test_dropout_draws_the_references_bits(p: float, seed: int) -> None:
        held = torch.tensor([seed])
        got = torch.empty(16, 32, dtype=torch.int8)
        threshold, kept = dropout_terms(p)
        keep_probe[(1,)](held, got, 64, 5, threshold, ROWS=16, COLUMNS=32)
        whole = philox.attention_keeps(held, 2, 3, 19, 96, p)
        assert torch.equal(got.bool(), whole[1, 2, 3:, 64:])
        assert (threshold, kept) == (philox.threshold(p), philox.factor(p))

    def run(
        query: Tensor, key: Tensor, value: Tensor, grad: Tensor, left: int, right: int
    ) -> tuple[Tensor | None, ...]:
        none = (None,) * 7
        bounds = (left, right, True, 0.25, 0.0, 0.0)
        out, lse = kernels.forward(query, key, value, *none, *bounds)
        needs = [True, True, True, False, False]
        saved = (query, key, value, *none[:4], out, lse)
        return (out, *kernels.backward(grad, None, *saved, *bounds, needs)[:3])

    @pytest.mark.parametrize(("left", "right"), [(30, -1), (-1, 30), (30, 0), (20, 20)])
    def test_blocks_that_a_window_hides_are_not_visited(left: int, right: int) -> None:
        """What is there may be anything, NaN too."""
        query, key, value, grad = (drawn(1, 1, 768, 16) for _ in range(4))
        before = run(query, key, value, grad, left, right)
        # Bounds hide keys far behind or far ahead, and queries from these.
        behind = left >= 0
        far, near = slice(0, 256), slice(384, 768)
        if not behind:
            far, near = slice(512, 768), slice(0, 384)
        key, value = key.clone(), value.clone()
        key[:, :, far] = value[:, :, far] = torch.nan
        out, grad_query, _, _ = run(query, key, value, grad, left, right)
        assert torch.equal(out[:, :, near], before[0][:, :, near])
        assert torch.equal(grad_query[:, :, near], before[1][:, :, near])

    @pytest.mark.parametrize(("left", "right"), [(30, -1), (-1, 30), (30, 0), (20, 20)])
    def test_queries_that_a_window_hides_are_not_visited(left: int, right: int) -> None:
        query, key, value, grad = (drawn(1, 1, 768, 16) for _ in range(4))
        before = run(query, key, value, grad, left, right)
        far, near = (
            (slice(512, 768), slice(0, 256)) if left >= 0 else (slice(0, 256), slice(512, 768))
        )
        query, grad = query.clone(), grad.clone()
        query[:, :, far] = grad[:, :, far] = torch.nan
        _, _, grad_key, grad_value = run(query, key, value, grad, left, right)
        assert torch.equal(grad_key[:, :, near], before[2][:, :, near])
        assert torch.equal(grad_value[:, :, near], before[3][:, :, near])

    def test_the_same_bits_in_every_run() -> None:
        def step() -> list[Tensor]:
            torch.manual_seed(3)
            query, key, value = (drawn(2, heads, 70, 16).requires_grad_() for heads in (4, 2, 2))
            bias, sinks = drawn(1, 4, 1, 70).requires_grad_(), drawn(4).requires_grad_()
            inputs = (query, key, value, bias, sinks)
            with bigops.use_backend("triton"):
                out, lse = bigops.attention(
                    *inputs[:3], bias=bias, sinks=sinks, dropout_p=0.3, return_lse=True
                )
                return [out, lse, *torch.autograd.grad((out.sum() + lse.sum()), inputs)]

        first = step()
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))

    @pytest.mark.usefixtures("nan_memory")
    @pytest.mark.parametrize("name", ["attention", "varlen_attention"])
    def test_descriptors_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With gradients, of all samples whose rows lie as descriptors want them."""
        described, op, asked = kernels._described, bigops.ops.get(name), []
        tiles = kernels.tiles_for  # the same either way
        monkeypatch.setattr(kernels, "tiles_for", lambda *args: tiles(*args[:3], 0))

        def asking(*tensors: Tensor) -> bool:
            asked.append(described(*tensors))
            return asked[-1]

        def no(*tensors: Tensor) -> bool:
            return False

        for sample in op.samples:
            if sample.bench or check.serves(op, sample, "triton", torch.bfloat16, "cpu"):
                continue
            call, found = sample.make("cpu", torch.bfloat16), []
            for choice in (asking, no):
                monkeypatch.setattr(kernels, "_described", choice)
                torch.manual_seed(5)  # dropout's
                with bigops.use_backend("triton"):
                    found.append(check._run(op, op.function, *call))
            torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True, msg=sample.name)
        assert asked.count(True) > 10
        assert asked.count(False) > 5

    def test_a_row_of_one_key_and_a_sink() -> None:
        with bigops.use_backend("triton"):
            assert (found := one_key_and_a_sink()).ok, found

    def test_rows_that_descriptors_take() -> None:
        rows = drawn(2, 3, 5, 24, dtype=torch.bfloat16)
        memory = drawn(2 * 3 * 5 * 24 + 1, dtype=torch.bfloat16)
        assert kernels._described(rows, rows.transpose(1, 2))
        for other in (
            rows[..., 1:],  # in memory from an odd element on
            memory[1:].view_as(rows),
            drawn(2, 3, 5, 20, dtype=torch.bfloat16),  # whose rows are 40 bytes
            rows.transpose(2, 3),
            rows[:, :1].expand(2, 3, 5, 24),
            rows.float(),  # of IEEE products
        ):
            assert not kernels._described(other)
        assert not kernels._described(rows, rows[..., 1:])
        for arch, has in (("sm_86", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)):
            with hardware.pretend(hardware.Hardware(arch, 1, 1 << 20)):
                assert kernels._described(rows) == has

    def by_fp8_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As plain torch makes it: P in e4m3, where in its range it is finest."""
        scores = query.float() @ key.float().transpose(-2, -1) * scale
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        rounded = (weights * 256.0).to(E4M3).float()
        return (rounded @ value.float() / (256.0 * weights.sum(-1, keepdim=True))).bfloat16()

    @pytest.mark.parametrize("descaled", [False, True])
    @pytest.mark.parametrize("arch", ["", "sm_80"])
    def test_float8(arch: str, descaled: bool) -> None:
        """On sm_80 the kernel decodes the bytes, elsewhere products take them as they are."""
        query, key, value = (drawn(2, 4, n, 40, dtype=E4M3) for n in (100, 190, 190))
        factors = [torch.rand(2, 4) + 0.5 for _ in range(3)] if descaled else [None] * 3
        names = dict(zip(("q_descale", "k_descale", "v_descale"), factors, strict=True))
        with bigops.use_backend("triton"), hardware.pretend(hardware.Hardware(arch, 1, 1 << 20)):
            out, lse = bigops.attention(query, key, value, return_lse=True, **names)
        q, k, v = (
            t.double() * (1.0 if f is None else f[..., None, None].double())
            for t, f in zip((query, key, value), factors, strict=True)
        )
        want, want_lse = reference(q, k, v, scale=40**-0.5)
        eager = by_fp8_products(q, k, v, 40**-0.5)
        if arch:
            eager = reference(q.half(), k.half(), v.half(), scale=40**-0.5)[0].bfloat16()
        eager_lse = reference(q.float(), k.float(), v.float(), scale=40**-0.5)[1]
        assert out.dtype == torch.bfloat16
        for found in (
            check.compare("out", out, eager, want),
            check.compare("lse", lse, eager_lse, want_lse),
        ):
            assert found.ok, found

    def test_every_byte_of_float8_is_decoded() -> None:
        """One key: the output is its value."""
        value = torch.arange(256, dtype=torch.uint8).view(E4M3).view(1, 1, 1, 256)
        zeros = torch.zeros(1, 1, 1, 16).to(E4M3)
        with bigops.use_backend("triton"), hardware.pretend(hardware.Hardware("sm_80", 1, 1 << 20)):
            out = bigops.attention(zeros, zeros, value)
        assert torch.equal(out.isnan(), value.float().isnan())
        assert torch.equal(out.nan_to_num(), value.bfloat16().nan_to_num())

else:

    def test_interpreted() -> None:
        SESSION(str(HERE), at_least=43)
