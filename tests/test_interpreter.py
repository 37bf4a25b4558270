"""The interpreter's bfloat16 and its dot: wrong as Triton ships them, right as bigops corrects
them.

The facts below are checked in two interpreted processes. In the corrected one each must hold; in
the other each must fail, so that a Triton that mends one is noticed and the correction deleted.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch

from bigops.backends import interpreter

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

HERE = Path(__file__).resolve()
PROCESS = runpy.run_path(str(HERE.with_name("interpreter.py")))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CORRECTED = os.environ.get(PROCESS["UNCORRECTED"]) != "1"


@triton.jit
def probe(x_ptr, y_ptr, out_ptr, FACT: tl.constexpr):
    tile = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x, y = tl.load(x_ptr + tile), tl.load(y_ptr + tile)
    if FACT == "dot":
        result = tl.dot(x, y)
    elif FACT == "dot rounds once":
        result = tl.dot(x, y, x, input_precision="ieee")
    elif FACT == "sum rounds once":
        result = tl.sum(x, 0)[None, :] + tl.zeros([16, 16], tl.float32)
    elif FACT == "round":
        result = (x.to(tl.float32) + y.to(tl.float32)).to(tl.bfloat16).to(tl.float32)
    elif FACT == "round explicitly":
        wide = x.to(tl.float32) + y.to(tl.float32)
        result = wide.to(tl.bfloat16, fp_downcast_rounding="rtne").to(tl.float32)
    elif FACT == "add":
        result = (x + y).to(tl.float32)
    elif FACT == "negate":
        result = (-x).to(tl.float32)
    elif FACT == "round to fp8":
        result = (x.to(tl.float32) / 64.0).to(tl.float8e4nv).to(tl.float32)
    elif FACT == "compare":
        result = tl.where(x < y, 1.0, 0.0)
    else:
        result = tile.to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + tile, result)


FACTS = {
    "dot": lambda x, y: x.float() @ y.float(),
    "dot rounds once": lambda x, y: (x.double() @ y.double() + x.double()).float(),
    "sum rounds once": lambda x, y: x.double().sum(0).float().expand(16, 16),
    "round": lambda x, y: (x.float() + y.float()).bfloat16().float(),
    "round explicitly": lambda x, y: (x.float() + y.float()).bfloat16().float(),
    "add": lambda x, y: (x + y).float(),
    "negate": lambda x, y: -x.float(),
    "round to fp8": lambda x, y: (x.float() / 64).to(torch.float8_e4m3fn).float(),
    "compare": lambda x, y: (x < y).float(),
    "convert an integer": lambda x, y: torch.arange(256).view(16, 16).bfloat16().float(),
}

if INTERPRETED:

    @pytest.mark.parametrize("fact", FACTS)
    def test_fact(fact: str) -> None:
        once = fact.endswith("rounds once")
        x, y = 8 * torch.randn(2, 16, 16, dtype=torch.float32 if once else torch.bfloat16)
        out = torch.full((16, 16), torch.nan)
        probe[(1,)](x, y, out, FACT=fact)
        want = FACTS[fact](x, y)
        right = torch.equal(out, want) if once else torch.allclose(out, want, rtol=1e-6, atol=1e-5)
        assert right == CORRECTED, (
            "the correction in bigops/backends/interpreter.py is wrong"
            if CORRECTED
            else f"Triton {triton.__version__} mends '{fact}': delete its correction"
        )

else:

    def test_upstream_is_still_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(PROCESS["UNCORRECTED"], "1")
        PROCESS["session"](str(HERE), at_least=len(FACTS))

    def test_correction_is_right() -> None:
        PROCESS["session"](str(HERE), at_least=len(FACTS))

    def test_a_failing_session_is_an_error() -> None:
        with pytest.raises(AssertionError, match=r"0 interpreted tests ran|failed"):
            PROCESS["session"](str(HERE), "-k", "no such test")

    @pytest.mark.parametrize("lower", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    def test_rounding_is_torchs(lower: int) -> None:
        upper = torch.arange(2**16, dtype=torch.int64) << 16
        values = (upper | lower).to(torch.int32).view(torch.float32)
        bits = interpreter.narrow(values.numpy())
        got, want = torch.from_numpy(interpreter.widen(bits)), values.bfloat16().float()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[~want.isnan()], want[~want.isnan()])
