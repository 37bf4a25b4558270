"""kernels/products.py: a long fp32 sum is one of its steps' sums, not one chain of FMAs.

The corrected interpreter rounds each `tl.dot` once, a GPU after each FMA: in an interpreted process
the products here are chains, as there. That the compiler leaves the steps apart is seen in its IR.
"""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
products = pytest.importorskip("bigops.kernels.products")

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STEP, STEPS = 32, 128


@triton.jit
def probe(x_ptr, y_ptr, out_ptr, steps, STEP: tl.constexpr, APART: tl.constexpr):
    """out = x @ y of (16, steps * STEP) and (steps * STEP, 16)."""
    offs, inner = tl.arange(0, 16), tl.arange(0, STEP)
    acc = tl.zeros((16, 16), tl.float32)
    for step in range(steps):
        k = step * STEP + inner
        x = tl.load(x_ptr + offs[:, None] * (steps * STEP) + k[None, :])
        y = tl.load(y_ptr + k[:, None] * 16 + offs[None, :])
        if APART:
            acc = products.add_product(x, y, acc, "ieee")
        else:
            acc = tl.dot(x, y, acc, input_precision="ieee")
    tl.store(out_ptr + offs[:, None] * 16 + offs[None, :], acc)


if INTERPRETED:
    import numpy as np
    from triton.runtime import interpreter

    @pytest.fixture
    def chains(monkeypatch: pytest.MonkeyPatch) -> None:
        """tl.dot as the CUDA cores compute it: an FMA for each product, into the accumulator."""

        def dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
            left, right = a.data.astype(np.float64), b.data.astype(np.float64)
            acc = c.data
            for k in range(left.shape[1]):
                acc = (left[:, k, None] * right[None, k] + acc).astype(np.float32)
            return interpreter.TensorHandle(acc, c.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)

    @pytest.mark.usefixtures("chains")
    def test_error_grows_with_the_steps_and_a_step_not_with_the_sum() -> None:
        x, y = torch.rand(16, STEP * STEPS), torch.rand(STEP * STEPS, 16)

        def error(apart: bool) -> float:
            out = torch.empty(16, 16)
            probe[(1,)](x, y, out, STEPS, STEP=STEP, APART=apart)
            return rms(out.double() - x.double() @ y.double())

        # Chains of 4096 roundings against chains of 32 and 128: by sqrt(4096 / 160), if random.
        assert error(True) < 0.3 * error(False)

    def rms(values: Tensor) -> float:
        return values.square().mean().sqrt().item()

else:

    def test_interpreted() -> None:
        session = runpy.run_path(str(HERE.with_name("interpreter.py")))["session"]
        session(str(HERE))

    @pytest.mark.parametrize("apart", [False, True])
    def test_steps_stay_apart_in_the_compiler(apart: bool) -> None:
        """Triton turns `acc + tl.dot(x, y)` into `tl.dot(x, y, acc)`; see triton/Combine.td."""
        types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "out_ptr": "*fp32", "steps": "i32"}
        constants = {"STEP": STEP, "APART": apart}
        signature = types | dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(fn=probe, signature=signature, constexprs=constants)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        code = triton.compile(source, target=target).asm["ttir"]
        zeros = re.findall(r"(%\S+) = arith.constant dense<0.0\S*> : tensor<16x16xf32>", code)
        (into,) = re.findall(r"tt.dot %\S+, %\S+, (%\S+?),? ", code)
        assert (into in zeros) == apart
