"""Boxes of pixels: how the tensor memory accelerator takes a convolution's tiles out of images.

A tile of the product is a box of the output: some columns of some rows of some images. What a tap
of the filter meets of the input is a box as large, moved by the tap, and zero beyond the image,
which is what padding wants. So one instruction loads it past the registers, by a descriptor (PTX
ISA, "tensormap"), where pointers take an address and a mask for each pixel. Images must be
channels_last for it, and their pixels start at multiples of 16 bytes. (The accelerator's own mode
for convolutions, "im2col", is out of Triton's reach.)

None of it has run on a GPU yet: interpreted, and compiled for sm_90 and sm_100.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hardware

ALIGNED = 16  # bytes: what descriptors ask of addresses and strides
FAR = tl.constexpr(-(1 << 30))  # a row or column outside every image
# Both are guesses: not measured yet.
# Boxes cover more than an output whose sizes they do not divide, pointers take pixels as they come:
# so many times the tiles of these may boxes take.
MOST_TILES = 1.25
# A program writes its descriptors to global memory and waits until they are seen there, which takes
# as long as a step or two.
FEWEST_STEPS = 4


@triton.jit
def describe(
    ptr, images, height, width, channels, stride_n, stride_h, stride_w,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What `load_box` reads from; channels lie one after the other."""
    return tl.make_tensor_descriptor(
        ptr,
        [images, height, width, channels],
        [stride_n, stride_h, stride_w, 1],
        [BOX_N, BOX_H, BOX_W, BLOCK_C],
    )


@triton.jit
def load_box(described, image, row, column, channel):
    """A box as (pixels, channels); zero where it is outside."""
    box = described.load([image, row, column, channel])
    return box.reshape(box.shape[0] * box.shape[1] * box.shape[2], box.shape[3])


@triton.jit
def start_of_box(box, height, width, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Image, row and column of the first pixel."""
    across = tl.cdiv(width, BOX_W)
    down = tl.cdiv(height, BOX_H)
    return box // (across * down) * BOX_N, box // across % down * BOX_H, box % across * BOX_W


@triton.jit
def pixels_of_box(
    image, row, column, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr
):
    """Image, row and column of each pixel of a box that starts there."""
    offs = tl.arange(0, BOX_N * BOX_H * BOX_W)
    images = image.to(tl.int64) + offs // (BOX_H * BOX_W)
    return images, row + offs // BOX_W % BOX_H, column + offs % BOX_W


@triton.jit
def windows_together(tile, BOX_H: tl.constexpr, BOX_W: tl.constexpr, POOL: tl.constexpr):
    """A box's pixels in the order of POOL x POOL windows instead of rows."""
    rows: tl.constexpr = tile.shape[0] // BOX_W // POOL
    columns: tl.constexpr = BOX_W // POOL
    tile = tl.reshape(tile, (rows, POOL, columns, POOL, tile.shape[1]))
    tile = tl.permute(tile, (0, 2, 1, 3, 4))
    return tl.reshape(tile, (rows * columns * POOL * POOL, tile.shape[4]))


@triton.jit
def met_by_tap(tap, size, out_size, stride, padding, dilation):
    """What a tap meets along one dimension, of which the output takes every stride-th pixel: the
    first of those, how many there are until the last one met, and which of them is the output's
    first. Of those beyond, which no output meets, nothing may be read: it may be infinite."""
    around = tl.cdiv(padding, stride)  # steps that keep what follows from being negative
    place = tap * dilation + around * stride - padding
    first = place % stride
    moved = place // stride - around
    count = tl.minimum(tl.cdiv(size - first, stride), out_size + moved)
    return first, tl.maximum(count, 1), tl.where(count > 0, moved, FAR)


class Box(NamedTuple):
    """So many images, rows and columns: powers of two."""

    images: int
    height: int
    width: int

    def tiles(self, images: int, height: int, width: int) -> int:
        """How many boxes cover an output."""
        sizes = zip((images, height, width), self, strict=True)
        n, h, w = (triton.cdiv(size, side) for size, side in sizes)
        return n * h * w


BY_POINTERS = Box(0, 0, 0)


def box_for(pixels: int, images: int, height: int, width: int) -> Box:
    """The box of so many pixels of which fewest cover the output; of these the one of fewest images
    that is most nearly a square, as its neighbours share most of what they read."""
    sides = [1 << i for i in range(pixels.bit_length())]
    boxes = [Box(pixels // (h * w), h, w) for h in sides for w in sides if h * w <= pixels]
    return min(
        boxes,
        key=lambda box: (box.tiles(images, height, width), box.images, box.height + box.width),
    )


def choose(
    rows: int,
    steps: int,
    sizes: tuple[int, int, int],
    precision: str,
    tensors: Sequence[Tensor | None],
    pitches: Sequence[int],
) -> Box:
    """The box of a tile of so many rows of an output of `sizes` (images, height, width), for a
    program that reads all tensors by descriptors in so many steps; BY_POINTERS where it does not.
    Groups start `pitches` elements after one another. IEEE products of fp32 take their operands
    from registers."""
    given = [x for x in tensors if x is not None]
    here = hardware.of(given[0])
    ieee = given[0].dtype == torch.float32 and precision == "ieee"
    aligned = all(pitch * given[0].element_size() % ALIGNED == 0 for pitch in pitches)
    if ieee or not here.descriptors or not aligned or not all(map(_regular, given)):
        return BY_POINTERS
    images, height, width = sizes
    box = box_for(rows, images, height, width)
    wide = box.tiles(*sizes) > MOST_TILES * triton.cdiv(images * height * width, rows)
    few = steps < FEWEST_STEPS
    return BY_POINTERS if not here.interpreted and (few or wide) else box


def _regular(x: Tensor) -> bool:
    """Whether descriptors take (N, C, H, W)."""
    n, channel, h, w = legal_strides(x)
    steps = [step * x.element_size() for step in (n, h, w)]
    aligned = all(step > 0 and step % ALIGNED == 0 for step in (*steps, x.data_ptr()))
    return x.numel() > 0 and channel == 1 and aligned


def legal_strides(x: Tensor) -> list[int]:
    """The strides of x, those that nothing goes by as descriptors want them."""
    return [
        ALIGNED if size == 1 and dim != 1 else step
        for dim, (size, step) in enumerate(zip(x.shape, x.stride(), strict=True))
    ]


def in_one_row(*images: Tensor | None) -> tuple[Tensor | None, ...]:
    """(N, C, H, W) as one image of one row, (1, C, 1, N * H * W), where all can be: the pixels of a
    plain product, whose boxes are full whatever the sizes."""
    given = [x for x in images if x is not None]
    steps = [_pixel_step(x) for x in given]
    if len({(x.shape[0], *x.shape[2:]) for x in given}) > 1 or None in steps:
        return images
    pixels = given[0].numel() // given[0].shape[1]
    # Offsets within an image are 32 bits wide, with room for a tile beyond the end.
    if pixels * max(step for step in steps if step is not None) > 2**31 - 2**16:
        return images
    return tuple(None if x is None else _row(x, pixels) for x in images)


def _row(x: Tensor, pixels: int) -> Tensor:
    step = _pixel_step(x) or 0
    steps = (step * pixels, x.stride(1), step * pixels, step)
    return x.as_strided((1, x.shape[1], 1, pixels), steps)


def _pixel_step(x: Tensor) -> int | None:
    """How far all neighbouring pixels are from one another; None where it differs."""
    dims = [dim for dim in (3, 2, 0) if x.shape[dim] > 1]
    for inner, outer in itertools.pairwise(dims):
        if x.stride(outer) != x.stride(inner) * x.shape[inner]:
            return None
    return x.stride(dims[0]) if dims else ALIGNED
