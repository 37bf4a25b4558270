"""The schedules of our CUDA C++ kernels, and the published ones that the model must be right about.

Tiles are read from the sources, or from the kernels' names in cuda.txt where there are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import nvcc
from .schedule import Allowed, Attention, Call, Stream, allowed, streaming
from .schedule_parts import A100, H100, H200, Part

FULL, CAUSAL = Call(8192, causal=False), Call(8192, causal=True)
WIDEST_BACKWARD = 128  # of heads whose gradients a warpgroup of Hopper can hold
WGMMA_REGISTERS = 65536  # of a multiprocessor: one block has them all


@dataclass(frozen=True)
class Kernel:
    """A schedule, the op that it is for, and the part and calls that it is made for."""

    op: str
    schedule: Attention | Stream
    part: Part
    calls: tuple[Call, ...] = (FULL, CAUSAL)

    def rows(self) -> Iterator[Allowed]:
        if isinstance(self.schedule, Stream):
            yield streaming(self.schedule, self.part)
            return
        for call in self.calls:
            yield allowed(self.schedule, self.part, call)


def kernels() -> list[Kernel]:
    """All of ours but those that are as fast as memory, of which Adam's step stands for all."""
    return [*_forward_sm90(), *_backward_sm90(), *_forward_sm80(), *_backward_sm80(), *_adam()]


def _hopper(kernel: str, head_size: int, inner: int, groups: int, slots: int = 4) -> Attention:
    """A ring that TMA fills, a producer warpgroup and consumers of 64 rows each."""
    threads = 128 * (groups + 1)
    return Attention(
        kernel, head_size, 64 * groups, inner, groups, "wgmma", "within",
        registers=WGMMA_REGISTERS // threads // 8 * 8, threads=threads, slots=slots,
        heaviest_first=True,
    )  # fmt: skip


def _forward_sm90() -> Iterator[Kernel]:
    found: dict[int, list[Attention]] = {}
    for d, keys, groups, queries, *stages in _tiles("attention_forward_sm90_kernel"):
        tiles = _hopper("attention_forward_sm90_kernel", d, keys, groups, 2 * (stages or [2])[0])
        tiles = replace(tiles, outer_tiles=queries, sum_with_exponential=True)
        found.setdefault(d, []).append(tiles)
    for of_size in found.values():
        # Wide blocks of keys where none is masked, narrow ones along a diagonal.
        of_size.sort(key=lambda tiles: tiles.inner)
        yield Kernel("attention", of_size[-1], H200, (FULL,))
        yield Kernel("attention", of_size[0], H200, (CAUSAL,))


def _backward_sm90() -> Iterator[Kernel]:
    for d, rows in _tiles("attention_backward_sm90_kernel"):
        tiles = _hopper_backward("attention_backward_sm90_kernel", d, rows)
        if d > WIDEST_BACKWARD:  # two warpgroups share 64 keys by columns; nobody writes dQ
            tiles = replace(tiles, outer=64, exchange=True, barriers=3)
        yield Kernel("attention", tiles, H200)


def _hopper_backward(kernel: str, head_size: int, inner: int) -> Attention:
    """Two consumers, which meet at each tile, as they exchange dS. Waits: queries, grad_out, the
    other's dS, room for dQ, dQ written."""
    tiles = _hopper(kernel, head_size, inner, groups=2)
    return replace(tiles, backward=True, barriers=5, overlap="none")


def _forward_sm80() -> Iterator[Kernel]:
    found: dict[int, list[Attention]] = {}
    for d, warps, row_tiles, keys, slots in _tiles("attention_forward_sm80_kernel"):
        tiles = Attention(
            "attention_forward_sm80_kernel", d, 16 * row_tiles * warps, keys, warps // 4,
            "mma.sync", "none", registers=255, threads=32 * warps, slots=slots, barriers=2,
            sum_with_exponential=True, heaviest_first=True,
        )  # fmt: skip
        found.setdefault(d, []).append(tiles)
    for of_size in found.values():  # smaller ones are for GPUs with less shared memory
        yield Kernel("attention", max(of_size, key=lambda t: (t.outer, t.shared)), A100)


def _backward_sm80() -> Iterator[Kernel]:
    found: dict[int, list[Attention]] = {}
    for d, queries, keys, warps, stages in _tiles("attention_backward_sm80_kernel"):
        tiles = Attention(
            "attention_backward_sm80_kernel", d, keys, queries, warps // 4, "mma.sync", "none",
            registers=255, threads=32 * warps, slots=2 * stages, barriers=4 - stages,
            backward=True, exchange=True, heaviest_first=True,
        )  # fmt: skip
        found.setdefault(d, []).append(tiles)
    for of_size in found.values():
        yield Kernel("attention", max(of_size, key=lambda t: t.shared), A100)


def _adam() -> Iterator[Kernel]:
    for built in nvcc.recorded()[1]:
        if built.kernel.startswith("adam_kernel<float, void, false") and built.target == "sm_90":
            # Twice four reads of 16 bytes are under way in each thread.
            yield Kernel("adam", Stream("adam_kernel", built.registers, 256, 128, 28), H200)
            return  # others differ in how many tensors they take


def _tiles(kernel: str) -> list[tuple[int, ...]]:
    """What a kernel is instantiated with: the numbers after the type in ForwardTiles<type, 64, 128>
    or BackwardTiles."""
    _, direction, family, _ = kernel.split("_")
    kind, numbers = rf"\b{direction.title()}Tiles", r"((?:\d+, )*\d+)"
    text = "".join(path.read_text() for path in nvcc.sources() if family in path.name)
    pattern = rf"{kind}<T, {numbers}"
    if not text:
        names = [k.kernel for k in nvcc.recorded()[1] if k.kernel.startswith(kernel)]
        text, pattern = "\n".join(names).replace("(int)", ""), rf"{kind}<\w+, {numbers}"
    return sorted({tuple(map(int, found.split(", "))) for found in re.findall(pattern, text)})


@dataclass(frozen=True)
class Published:
    """A figure that others measured, and the schedule that they say it has."""

    what: str
    schedule: Attention
    part: Part
    call: Call
    tflops: float
    source: str

    @property
    def model(self) -> Allowed:
        return allowed(self.schedule, self.part, self.call)

    @property
    def deviation(self) -> float:
        """Of the model, as a part of what was measured."""
        return self.model.tflops / self.tflops - 1


def _fa2(head_size: int, outer: int, inner: int) -> Attention:
    """Four warps, keys and values once in shared memory, two __syncthreads a tile. 255 registers
    let two blocks onto a multiprocessor; fewer than 169, which would let three, cannot hold it."""
    return Attention(
        "FlashAttention-2", head_size, outer, inner, 1, "mma.sync", "none",
        registers=255, threads=128, slots=2, barriers=2,
    )  # fmt: skip


def _fa3(head_size: int, inner: int, groups: int, multicast: int = 1) -> Attention:
    tiles = _hopper("FlashAttention-3", head_size, inner, groups)
    return replace(tiles, multicast=multicast)


FA4_BACKWARD = _hopper_backward("FlashAttention-4", 128, 80)
LONG, LONG_CAUSAL = Call(16384, causal=False), Call(16384, causal=True)
ABLATED = Call(16896, causal=False, tokens=4 * 16896)
FIGURE, ABLATION = "FA3, figure 5", "FA3, table 2"
TABLES = "cuDNN's tables, 2026-09, another card"
# Tiles: csrc/flash_attn/src/flash_fwd_launch_template.h; hopper/flash_fwd_launch_template.h of
# July 2024 (clusters of two blocks where nothing is masked); flash_attn/cute/interface.py.
PUBLISHED = (
    Published("FA2, D 128", _fa2(128, 128, 64), H100, LONG, 370, FIGURE),
    Published("FA3, D 128", _fa3(128, 176, 2, 2), H100, LONG, 648, FIGURE),
    Published("FA2, D 64", _fa2(64, 128, 128), H100, LONG, 324, FIGURE),
    Published("FA3, D 64", _fa3(64, 128, 3), H100, LONG, 497, FIGURE),
    Published("FA2, D 256", _fa2(256, 64, 64), H100, LONG, 326, FIGURE),
    Published("FA3, D 256", _fa3(256, 80, 2, 2), H100, LONG, 756, FIGURE),
    Published("FA2, D 128", _fa2(128, 128, 64), H100, LONG_CAUSAL, 335, FIGURE),
    Published("FA3, D 128", _fa3(128, 128, 2), H100, LONG_CAUSAL, 616, FIGURE),
    Published("FA2, D 64", _fa2(64, 128, 128), H100, LONG_CAUSAL, 299, FIGURE),
    Published("FA3, D 64", _fa3(64, 128, 3), H100, LONG_CAUSAL, 473, FIGURE),
    Published("FA2, D 256", _fa2(256, 64, 64), H100, LONG_CAUSAL, 298, FIGURE),
    Published("FA3, D 256", _fa3(256, 80, 2), H100, LONG_CAUSAL, 642, FIGURE),
    Published("FA3, D 128", _fa3(128, 176, 2, 2), H100, ABLATED, 661, ABLATION),
    Published(
        "FA3, D 128, no overlap within a warpgroup",
        replace(_fa3(128, 176, 2, 2), overlap="between"), H100, ABLATED, 582, ABLATION,
    ),
    Published("FA2, D 128, its best", _fa2(128, 128, 64), A100, LONG, 230, "FA2, section 4"),
    Published("FA4, D 128", _fa3(128, 128, 2), H200, FULL, 756, TABLES),
    Published("FA4, D 128", _fa3(128, 128, 2), H200, CAUSAL, 675, TABLES),
    Published("FA4, D 128, backward", FA4_BACKWARD, H200, FULL, 656, TABLES),
    Published(
        "FA4, D 128, backward", replace(FA4_BACKWARD, inner=64), H200, CAUSAL, 629, TABLES,
    ),
)  # fmt: skip
# The two that must come out right before our figures count. No number of the model was set by any
# of these; but what is counted was decided with the H100's in sight, and that steps of a backward
# tile follow each other with FA4's.
MAIN = PUBLISHED[:2]
