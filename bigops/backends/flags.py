"""The compiler's flags: one place for setup.py, which reads this file before there is a package to
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
