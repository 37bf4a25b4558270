"""Triton's interpreter, corrected: its bfloat16, its `tl.dot`; and faster.

`apply` corrects the interpreter of Triton 3.6 to 3.9. It holds bfloat16 as its 16 raw bits and
    - multiplies these bits in `tl.dot`, and adds, compares and negates them as integers,
    - truncates where hardware rounds to the nearest even,
    - takes the integer value for the bits when an integer is converted,
    - has no bfloat16 constants other than zero (3.6).
It rounds to fp8 (e4m3) without carrying from the mantissa into the exponent, and wrongly below its
normal numbers.
It also sums `tl.dot` in the order of numpy's BLAS, which changes with the processor: the error of
one and the same kernel passes here and fails there. `tl.sum` over all but the last dimension is one
long chain, as no hardware's is. The correction sums in float64 and rounds once.
What is judged then is the kernel's own arithmetic, the same everywhere: its formulas and all that
it rounds between products. What is not is the rounding within a product, on a GPU a chain of FMAs
(fp32) or the tensor core's: only there does eager round alike. (Of 905 fp32 tensors of attention,
the suspicious cases over-represented, 26 are above the limit with a BLAS, none rounded once; of
these with an emulated chain of FMAs 42. A CPU's eager seems to sum in blocks.)
`tests/test_interpreter.py` fails when upstream mends one of these, so that it can go from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_applied = False


def widen(bits: Any) -> Any:
    """bfloat16 bits to float32; exact."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: Any, truncate: bool = False) -> Any:
    """float32 to bfloat16 bits, to the nearest and halves to the even one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values)).view(np.uint32)
    half = np.uint32(0 if truncate else 0x7FFF) + (0 if truncate else (bits >> 16) & 1)
    rounded = (bits + half) >> np.uint32(16)
    # Rounding could carry a NaN into infinity: it stays a quiet NaN instead.
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


E4M3 = torch.float8_e4m3fn


def widen_fp8(bits: Any) -> Any:
    """e4m3 bits to float32; exact."""
    return torch.from_numpy(np.array(bits, np.uint8)).view(E4M3).float().numpy()


def narrow_fp8(values: Any) -> Any:
    """float32 to e4m3 bits as hardware does: halves to the even one, what is beyond to the last."""
    wide = torch.from_numpy(np.array(values, np.float32))
    top = torch.finfo(E4M3).max
    return wide.clamp(-top, top).to(E4M3).view(torch.uint8).numpy()


def apply() -> None:
    """Corrects the interpreter of this process; the environment must hold TRITON_INTERPRET=1."""
    global _applied
    if _applied:
        return
    _applied = True
    import triton.language as tl
    from triton.runtime import interpreter

    from bigops.backends import interpreter_speed

    interpreter_speed.apply()

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    rounding = interpreter._ir.ROUNDING_MODE
    exact = {tl.float16, tl.float32, tl.float64}

    def float32(value: Any) -> Any:
        """bfloat16 and e4m3 as float32; others as they are."""
        widened = {tl.bfloat16: widen, tl.float8e4nv: widen_fp8}.get(value.dtype.scalar)
        return value if widened is None else handle(widened(value.data), tl.float32)

    def corrected(plain: Callable[..., Any], keep: Callable[..., Any] | None = None) -> Any:
        """An elementwise operation: bfloat16 goes in and out as float32, comparisons stay bool."""

        def operate(self: Any, *arguments: Any) -> Any:
            *values, op = arguments
            if op is keep or values[-1].dtype.scalar != tl.bfloat16:
                return plain(self, *values, op)
            result = op(*(float32(value).data for value in values))
            return handle(result if result.dtype == bool else narrow(result), tl.bfloat16)

        return operate

    def cast(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            return plain_cast(self, float32(source), target)
        if after == tl.bfloat16 and (before in exact or before.is_int()):
            return handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, source, target)

    def fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.float8e4nv:
            return cast(self, float32(source), target)
        if after == tl.float8e4nv and (before == tl.bfloat16 or before in exact):
            return handle(narrow_fp8(float32(source).data), after)
        if before == tl.bfloat16 and after in exact:
            return plain_cast(self, float32(source), target)
        if after == tl.bfloat16 and before in exact:
            values = source.data.astype(np.float32)
            return handle(narrow(values, truncate=mode == rounding.RTZ), tl.bfloat16)
        return plain_fp_to_fp(self, source, target, mode)

    def dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        """One rounding, of product and accumulator together."""
        a, b = float32(a), float32(b)
        if not {a.dtype.scalar, b.dtype.scalar, c.dtype.scalar} <= {tl.float16, tl.float32}:
            return plain_dot(self, a, b, c, *rest)
        exact = a.data.astype(np.float64) @ b.data.astype(np.float64) + c.data
        return handle(exact.astype(c.data.dtype), c.dtype.scalar)

    def total(self: Any, values: Any) -> Any:
        data = values.handle.data
        exact = np.sum(
            data,
            axis=self.axis,
            keepdims=self.keep_dims,
            dtype=np.float64 if data.dtype == np.float32 else None,
        )
        return self.to_tensor(exact.astype(data.dtype), values.dtype)

    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    plain_dot = builder.create_dot
    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_dot = dot
    interpreter.ReduceOps.sum = total
    builder.binary_op = corrected(builder.binary_op)
    builder.unary_op = corrected(builder.unary_op)
    builder.ternary_op = corrected(builder.ternary_op, keep=np.where)
    builder.get_bf16 = lambda self, value: handle(
        narrow(np.array([value], np.float32)), tl.bfloat16
    )
    # Hardware computes inf - inf without a word.
    np.seterr(all="ignore")
