"""What a CUDA C++ kernel must not be, unless a reason is given for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .architectures import ARCHITECTURES
from .nvcc import Built, CudaKernel
from .rules import FEW

# All files together, on two cores.
BUILD_SECONDS = 300
CORES = 2


@dataclass(frozen=True)
class Reason:
    """Why kernels whose names and architectures match a pattern may break a rule."""

    rule: str
    why: str
    kernel: str = "*"
    target: str = "*"
    outside_loops: bool = False  # of spills: few bytes, which no inner loop touches

    def covers(self, rule: str, kernel: CudaKernel) -> bool:
        return (
            rule == self.rule
            and fnmatchcase(kernel.kernel, self.kernel)
            and fnmatchcase(kernel.target, self.target)
            and not (self.outside_loops and (kernel.in_loops or kernel.spills > FEW))
        )


def _both(why: str, kernel: str, target: str = "*") -> tuple[Reason, Reason]:
    """Spills that inner loops touch."""
    return Reason("spills", why, kernel, target), Reason("loops", why, kernel, target)


REASONS: tuple[Reason, ...] = (
    Reason("load", "a few numbers for each tensor", "adam_pace_kernel<*"),
    Reason("store", "a few numbers for each tensor", "adam_pace_kernel<*"),
    Reason("store", "a sum for each block", "grad_norm_kernel<*"),
    Reason("matrix", "rounds sums: no products", "attention_backward_convert_kernel<*"),
    Reason(
        "spills", "a few bytes, stored before the loops and loaded after them", outside_loops=True
    ),
    *_both(
        "24 bytes; on an H200 1.1 times as fast as cuDNN with them",
        "attention_forward_sm90_kernel<ForwardTiles<*, 256, 80, *",
    ),
    *_both(
        "softcap alone: 8 bytes, of which an iteration reads or writes 4",
        "attention_backward_sm90_kernel<BackwardTiles<*, 64, 128, true> >",
    ),
    *_both(
        "dK and dV of 128 keys fill the registers; on sm_90 and sm_100 other kernels come first",
        "attention_backward_sm80_kernel<BackwardTiles<*, 128, 64, 128, 8, 2>*",
    ),
    *_both(
        "softcap, where dK and dV fill the registers of 4 warps",
        "attention_backward_sm80_kernel<BackwardTiles<*, 96, 64, 64, 4, 2>, true>",
        "sm_80",
    ),
)


def broken(kernel: CudaKernel) -> dict[str, str]:
    """The rules that a kernel breaks, by name, and how; reasons aside."""
    found = {}
    if kernel.spills:
        found["spills"] = f"spills {kernel.spills} bytes of a thread's registers"
    if kernel.in_loops:
        found["loops"] = f"{kernel.in_loops} accesses to local memory in loops"
    has = ARCHITECTURES[kernel.target.removesuffix("a")].shared
    if kernel.shared > has:
        found["shared"] = f"asks for {kernel.shared} bytes of shared memory of {has}"
    wants = wanted(kernel)
    if wants and wants not in re.findall(r"(\w+):", kernel.matrix):
        found["matrix"] = f"{kernel.matrix or 'no matrix instruction'} where {wants} is due"
    for access in ("load", "store"):
        bits = getattr(kernel, access)
        if bits < 128 and not kernel.copies:
            found[access] = f"{access}s global memory by {bits} bits at most"
    return found


def wanted(kernel: CudaKernel) -> str:
    """The matrix instruction that is due, which the file's name says; or nothing."""
    if kernel.source.endswith("_sm90.cu"):
        return "wgmma"
    return "mma" if kernel.source.endswith("_sm80.cu") else ""


def complaints(kernels: Iterable[CudaKernel], reasons: Sequence[Reason] = REASONS) -> list[str]:
    """A line for each rule that a kernel breaks without a reason."""
    return [
        f"{kernel.kernel} ({kernel.source}) {kernel.target}: {how}"
        for kernel, rule, how in _breaches(kernels)
        if not any(reason.covers(rule, kernel) for reason in reasons)
    ]


def excuses(kernels: Iterable[CudaKernel]) -> list[str]:
    """A line for each rule that a kernel breaks, with the reason."""
    return [
        f"{kernel.kernel} ({kernel.source}) {kernel.target}: {how}: {reason.why}"
        for kernel, rule, how in _breaches(kernels)
        for reason in REASONS
        if reason.covers(rule, kernel)
    ]


def _breaches(kernels: Iterable[CudaKernel]) -> Iterator[tuple[CudaKernel, str, str]]:
    for kernel in kernels:
        for rule, how in broken(kernel).items():
            yield kernel, rule, how


def build_time(built: Mapping[str, Built], cores: int = CORES) -> int:
    """Seconds until all files are built, the longest first, a core to each."""
    free = [0] * cores
    for file in sorted(built.values(), key=lambda file: -file.seconds):
        free.sort()
        free[0] += file.seconds
    return max(free)
