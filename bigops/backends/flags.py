"""The compilers' flags: one place for setup.py, which reads this file before there is a package to
import, and for extension.py."""

from __future__ import annotations

import platform

IS_X86 = platform.machine() in ("x86_64", "AMD64")

V4 = "-march=x86-64-v4"
ISA_FLAGS = {
    "v3": "-march=x86-64-v3",
    "v4": V4,
    "v4_bf16": f"{V4} -mavx512bf16",
    "v4_amx": f"{V4} -mavx512bf16 -mamx-tile -mamx-bf16",
}

COMMON = "-std=c++20 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden"
# pybind11's templates take three times as long at -O3 and gain nothing from it.
BINDING = f"{COMMON} -O1"
# Contraction is off so that an FMA is where the source says fma(), the same on every build.
KERNEL = f"{COMMON} -O3 -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math"
# GCC's AVX-512 headers initialise registers with themselves (GCC bug 105593).
WARN = "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"

# Hidden, so that nothing of the static CUDA runtime is taken for another library's.
NVCC = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -cudart static"
HOPPER_ONLY = ("-gencode=arch=compute_90a,code=sm_90a",)
EVERYWHERE = (
    *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)),
    "-gencode=arch=compute_80,code=compute_80",
)


def gencode(stem: str) -> tuple[str, ...]:
    """nvcc's architectures of a file in csrc/cuda: sm_90a's instructions assemble for nothing else;
    other files are built for every architecture, with PTX of the oldest for those to come."""
    return HOPPER_ONLY if stem.endswith("_sm90") else EVERYWHERE
