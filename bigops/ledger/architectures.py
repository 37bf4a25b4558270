"""The GPUs of the ledger, and how many warps of a kernel fit on one multiprocessor.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; LLVM, "User
Guide for AMDGPU Backend", and AMD's CDNA 3 and CDNA 4 ISA references.
"""

from __future__ import annotations

from dataclasses import dataclass

# Per scheduler: both makers have 4 on a multiprocessor, with 512 registers for each lane of a warp,
# given out in eights.
SCHEDULERS = 4
WARP_REGISTERS = 512
GRANULE = 8
TENSOR_MEMORY = 512  # columns


@dataclass(frozen=True)
class Architecture:
    """A GPU's limits. Memory in bytes: `shared` a program, `shared_all` a multiprocessor."""

    name: str
    backend: str  # Triton's: "cuda" or "hip"
    multiprocessors: int  # of its largest part
    shared: int
    shared_all: int
    shared_reserved: int  # taken by the system, for each program
    shared_granule: int
    warps: int  # resident at most on a multiprocessor
    programs: int

    @property
    def amd(self) -> bool:
        return self.backend == "hip"

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.amd else 32

    @property
    def capability(self) -> int:
        """90 of sm_90; of NVIDIA's only."""
        return int(self.name.removeprefix("sm_"))


def _nvidia(
    name: str,
    multiprocessors: int,
    shared: int,
    shared_all: int,
    warps: int = 64,
    programs: int = 32,
) -> Architecture:
    return Architecture(
        name, "cuda", multiprocessors, shared << 10, shared_all << 10, 1024, 128, warps, programs
    )


def _amd(name: str, multiprocessors: int, shared: int, granule: int) -> Architecture:
    return Architecture(
        name, "hip", multiprocessors, shared << 10, shared << 10, 0, granule, 32, 16
    )


# sm_86 stands for the consumer parts (sm_89, sm_120): 99 KB of shared memory and mma.sync.
ARCHITECTURES = {
    a.name: a
    for a in (
        _nvidia("sm_80", 108, 163, 164),
        _nvidia("sm_86", 84, 99, 100, warps=48, programs=16),
        _nvidia("sm_90", 132, 227, 228),
        _nvidia("sm_100", 148, 227, 228),
        _amd("gfx942", 304, 64, 512),
        _amd("gfx950", 256, 160, 1280),
    )
}


@dataclass(frozen=True)
class Occupancy:
    """Programs on one multiprocessor at a time, and what keeps them from being more."""

    programs: int
    percent: int  # of the warps that could be resident
    limit: str


def occupancy(
    architecture: Architecture, registers: int, shared: int, warps: int, tensor_memory: int = 0
) -> Occupancy:
    """Of a kernel with these registers a thread, bytes of shared memory a program, warps a program
    and columns of tensor memory a program."""
    each = _round_up(max(registers, 1), GRANULE)
    used = _round_up(shared + architecture.shared_reserved, architecture.shared_granule)
    fits = {
        "registers": SCHEDULERS * (WARP_REGISTERS // each) // warps,
        "shared memory": architecture.shared_all // used if used else architecture.programs,
        "warps": architecture.warps // warps,
        "programs": architecture.programs,
    }
    if tensor_memory:
        fits["tensor memory"] = TENSOR_MEMORY // tensor_memory
    programs = min(fits.values())
    limit = ", ".join(name for name, count in fits.items() if count == programs)
    return Occupancy(programs, round(100 * programs * warps / architecture.warps), limit)


def _round_up(n: int, granule: int) -> int:
    return -(-n // granule) * granule
