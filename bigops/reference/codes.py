"""An optimizer's states as 8-bit codes, block by block (Dettmers et al. 2022, arXiv:2110.02861).

256 elements, in the order of their memory, share a scale, the largest size among them over 1.875;
each is an 8-bit float relative to it: three bits of mantissa, and four of exponent beside a sign
or, of numbers that have none, five. The code 0 is 0. Between two codes a hash of the number
decides, in proportion to how near they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
SHIFT, LARGEST = 20, 1.875  # 23 - 3 bits of mantissa that a code does not have


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales): uint8 of the shape and strides of `values`, float32 of a block each."""
    flat, order = _in_memory_order(values.float())
    blocks = _blocks(flat)
    largest = blocks.abs().amax(1)
    there = largest >= LARGEST * torch.finfo(torch.float32).tiny
    scales = torch.where(there, largest * (1 / LARGEST), 0.0)
    inverse = torch.where(there, LARGEST / largest, 0.0)
    bits = (blocks * inverse[:, None]).view(torch.int32)
    hashed = (blocks.view(torch.int32).long() * 0x9E3779B1 & 0xFFFFFFFF) >> (32 - SHIFT)
    size = ((bits & 0x7FFFFFFF) - _bias(signed)).clamp(min=0)
    codes = ((size + hashed.int()) >> SHIFT).clamp(max=127 if signed else 255)
    if signed:
        codes |= torch.where(bits < 0, 128, 0)
    else:
        codes = torch.where((codes == 0) & (bits > 0), 1, codes)
    found = torch.empty_like(values, dtype=torch.uint8)
    found.permute(order).copy_(codes.flatten()[: flat.numel()].view(found.permute(order).shape))
    return found, scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 numbers that codes stand for, of their shape and strides."""
    flat, order = _in_memory_order(codes.int())
    blocks = _blocks(flat)
    size = blocks & (127 if signed else 255)
    bits = torch.where(size == 0, 0, (size << SHIFT) + _bias(signed))
    values = bits.view(torch.float32)
    if signed:
        values = torch.where(blocks >= 128, -values, values)
    values = (values * scales[:, None]).flatten()[: flat.numel()]
    found = torch.empty_like(codes, dtype=torch.float32)
    found.permute(order).copy_(values.view(found.permute(order).shape))
    return found


def _bias(signed: bool) -> int:
    return (127 - 15 if signed else 127 - 31) << 23


def _in_memory_order(values: Tensor) -> tuple[Tensor, list[int]]:
    """Dimensions from the outermost in memory to the innermost, and the elements in that order."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    return values.permute(order).flatten(), order


def _blocks(flat: Tensor) -> Tensor:
    missing = -flat.numel() % BLOCK
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)
