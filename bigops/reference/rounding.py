"""Stochastic rounding to bfloat16 (Gupta et al. 2015, "Deep learning with limited numerical
precision"): up or down in proportion to where a number lies between two."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import in_memory_order
from .philox import LANES, philox


def round_to_bfloat16(values: Tensor, seed: Tensor, number: int) -> Tensor:
    """float32 values rounded, for the tensor of this number in a call.

    Of 16 bits, of Philox's counter (element // 8, number, 0, 0), each is added below the digits
    that stay; elements are counted in the order of their memory.
    """
    flat, order = in_memory_order(values)
    groups = torch.arange(-(-flat.numel() // LANES), device=values.device)
    nothing = torch.zeros_like(groups)
    words = philox(seed.to(values.device), (groups, nothing + number, nothing, nothing))
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    drawn = torch.stack(lanes, -1).flatten()[: flat.numel()]
    bits = flat.view(torch.int32).long() + drawn
    bits = ((bits >> 16) << 16).to(torch.int32)
    rounded = torch.where(flat.isfinite(), bits.view(torch.float32), flat).bfloat16()
    found = torch.empty_like(values, dtype=torch.bfloat16)
    found.permute(order).copy_(rounded.view(found.permute(order).shape))
    return found
