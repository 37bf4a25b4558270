"""How the optimizers' kernels read and write a block of a tensor's elements.

A row of the table (step_table.py) says where they are. What they are of is known at compile time:
parameters, gradients and states each have a dtype, states may be codes with scales (codes.py),
bfloat16 parameters may be rounded by a seed (rounding.py) and may leave a copy in another dtype.
Arithmetic between is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import CODE_BLOCK, decode, encode
from .rounding import round_to_bfloat16
from .step_table import CHUNK, COLUMNS, SIZE


@triton.jit
def row_of(table, chunk_tensor, chunk_index, found_inf_ptr):
    """This program's row, where its chunk starts, and how many elements it has: none, if the step
    is skipped."""
    chunk = tl.program_id(0)
    row = table + tl.load(chunk_tensor + chunk) * COLUMNS
    start = tl.load(chunk_index + chunk).to(tl.int64) * CHUNK
    rest = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    if found_inf_ptr is not None:
        rest = tl.where(tl.load(found_inf_ptr) == 0, rest, 0)
    return row, start, rest


@triton.jit
def pointer(row, start, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a row's column, start elements on. Accesses are as wide as the alignment that
    the compiler knows of; it takes the hint on the addition only, not on the address itself."""
    at = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(at, 16 if ALIGNED else DTYPE.primitive_bitwidth // 8)


@triton.jit
def scales_of(row, start, COLUMN: tl.constexpr, STATE_DTYPE: tl.constexpr):
    """The address of the chunk's scales; None where states are no codes."""
    scales = None
    if tl.uint8 == STATE_DTYPE:
        scales = tl.load(row + COLUMN).to(tl.pointer_type(tl.float32)) + start // CODE_BLOCK
    return scales


@triton.jit
def number_of(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def factor_of(sign, norm_ptr, scale_ptr, max_grad_norm):
    """What gradients are multiplied by: torch.nn.utils.clip_grad_norm_'s coefficient, unscaled."""
    inv_scale = 1.0
    if scale_ptr is not None:
        inv_scale = 1.0 / tl.load(scale_ptr).to(tl.float32)
    factor = sign * inv_scale
    if norm_ptr is not None:
        coefficient = max_grad_norm / (tl.load(norm_ptr).to(tl.float32) * inv_scale + 1e-6)
        # Written so that a NaN comes through, as in torch.
        factor *= tl.where(coefficient > 1.0, 1.0, coefficient)
    return factor


@triton.jit
def offsets(block, scales, BLOCK: tl.constexpr):
    """Of a block's elements; where states are codes, a row for each of their blocks."""
    if scales is None:
        offs = block + tl.arange(0, BLOCK)
    else:
        rows = tl.arange(0, BLOCK // CODE_BLOCK) * CODE_BLOCK
        offs = block + rows[:, None] + tl.arange(0, CODE_BLOCK)[None, :]
    return offs


@triton.jit
def _load(at, mask):
    return tl.load(at) if mask is None else tl.load(at, mask=mask, other=0)


@triton.jit
def load(at, mask):
    """float32."""
    return _load(at, mask).to(tl.float32)


@triton.jit
def load_state(at, scales, offs, mask, block, rest, SIGNED: tl.constexpr):
    """float32."""
    if scales is None:
        x = load(at + offs, mask)
    else:
        rows = block // CODE_BLOCK + tl.arange(0, offs.shape[0])
        scale = tl.load(scales + rows, mask=rows * CODE_BLOCK < rest, other=0.0)
        x = decode(_load(at + offs, mask), scale, SIGNED)
    return x


@triton.jit
def store_state(at, scales, x, offs, mask, block, rest, SIGNED: tl.constexpr):
    if scales is None:
        tl.store(at + offs, x.to(at.dtype.element_ty), mask=mask)
    else:
        # Elements beyond the last are 0 and make no scale larger.
        codes, scale = encode(x, SIGNED)
        rows = block // CODE_BLOCK + tl.arange(0, offs.shape[0])
        tl.store(at + offs, codes, mask=mask)
        tl.store(scales + rows, scale, mask=rows * CODE_BLOCK < rest)


@triton.jit
def store_param(at, copy_at, x, offs, mask, seed, number, first, BLOCK: tl.constexpr):
    """And of what is stored the copy. `first` is the block's first element in its tensor."""
    if seed is None:
        param = x.to(at.dtype.element_ty)
    else:
        param = round_to_bfloat16(x, seed, number, first, BLOCK)
    tl.store(at + offs, param, mask=mask)
    if copy_at is not None:
        tl.store(copy_at + offs, param.to(tl.float32).to(copy_at.dtype.element_ty), mask=mask)
