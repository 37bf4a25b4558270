"""The tiles of a convolution's products, by what computes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from . import hardware

WGMMA_ROWS = 64  # of a product, which wgmma takes at least


class Target(NamedTuple):
    """What tiles depend on besides sizes."""

    product: str  # "half", "tf32", "ieee" (fp32 on CUDA cores), or "interpreted"
    programs: int  # as many as fill the device
    roomy: bool  # a program may hold over 160 KB of shared memory

    @property
    def precision(self) -> str:
        return "tf32" if self.product == "tf32" else "ieee"


def target(x: torch.Tensor) -> Target:
    here = hardware.of(x)
    if here.interpreted:  # one by one: two programs, so that sums are split at all
        return Target("interpreted", 2, True)
    if x.dtype != torch.float32:
        product = "half"
    else:
        # Not cudnn.allow_tf32, which this flag follows: reading that raises once this one is set
        # alone.
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
        product = "tf32" if allowed and here.tf32 else "ieee"
    return Target(product, 2 * here.multiprocessors, here.shared > 160 << 10)


class Tiles(NamedTuple):
    """Rows, columns and depth of one program's product, and how Triton schedules it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def power_of_two(n: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(n)))


def conv_tiles(channels: int, filters: int, taps: int, vectors: bool, here: Target) -> Tiles:
    """Tiles of conv_kernel: pixels x filters, in steps of taps and channels."""
    depth = power_of_two(channels if channels >= 16 else channels * taps, 16, 64)
    if here.product == "interpreted":  # costs by the number of operations, whatever their size
        return Tiles(256, power_of_two(filters, 16, 64), depth, 4, 1)
    if here.product == "ieee":  # no tensor core: FMAs on registers, and 64 x 64 leaves room
        columns = power_of_two(filters, 16, 64)
        # At 32 columns ptxas trades registers for a fifth program, and two stages spill (sm_100).
        return Tiles(64, columns, 16, 4, 3 if columns == 32 else 2)
    # Without vectors every element's address takes two registers, and only data-center parts hold
    # three deep stages in shared memory at once. TF32 elements are twice as wide.
    deepest = 64 if vectors and here.roomy else 32
    depth = min(depth, deepest // 2 if here.product == "tf32" else deepest)
    # Two warpgroups of 64 rows, as wgmma takes them: at most 64 fp32 sums a thread. With one group
    # single addresses (Triton 3.6) and ReLU's second operand (sm_80) spill.
    return Tiles(128, power_of_two(filters, 16, 128), depth, 8, 3)


def weight_grad_tiles(columns: int, filters: int, vectors: bool, here: Target) -> Tiles:
    """Tiles of weight_grad_kernel: taps and channels x filters, in steps of pixels."""
    if here.product == "interpreted":
        return Tiles(power_of_two(columns, 16, 256), power_of_two(filters, 16, 64), 256, 4, 1)
    if here.product == "ieee":
        return Tiles(power_of_two(columns, 16, 64), power_of_two(filters, 16, 64), 16, 8, 2)
    # Fewer rows than wgmma takes are mma.sync's: a first layer, whose time is the memory's anyway.
    # Eight warps, as both operands' addresses are computed anew in every step.
    rows = power_of_two(columns, 16, 128)
    deepest = 64 if vectors and here.roomy else 32
    depth = deepest // 2 if here.product == "tf32" else deepest
    return Tiles(rows, power_of_two(filters, 16, 64), depth, 8 if rows == 128 else 4, 3)
