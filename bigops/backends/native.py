"""The native backend: C++ kernels, one extension module per instruction set, chosen at import.

`BIGOPS_CPU_ISA` picks a lesser instruction set than the best one (v3, v4, v4_bf16, v4_amx).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch  # before the kernels: its OpenMP runtime must be there, so that both share a pool


def _supported() -> list[str]:
    try:
        features = importlib.import_module("bigops._cpu_features")
    except ModuleNotFoundError:
        return []
    return list(features.supported())


def _choose(supported: list[str], wanted: str | None) -> tuple[str | None, str | None]:
    """(instruction set, None) or (None, reason)."""
    if wanted and wanted not in supported:
        listed = ", ".join(supported) or "none"
        raise ValueError(f"BIGOPS_CPU_ISA must be one of this machine's ({listed}), got {wanted!r}")
    if supported:
        return wanted or supported[-1], None
    if importlib.util.find_spec("bigops._cpu_features") is None:
        return None, "the native kernels are not built (no C++ compiler at install time?)"
    return None, "this processor has less than AVX2 and FMA (x86-64-v3)"


SUPPORTED = _supported()
ISA, REASON = _choose(SUPPORTED, os.environ.get("BIGOPS_CPU_ISA"))


def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's matrix products and convolutions of `dtype` are fast on this processor.

    oneDNN wants AVX-512 for bfloat16 and AVX-512 FP16, which no processor with AMX lacks, for
    float16. Elsewhere torch's own loops take 15 to 50 times as long as for float32.
    """
    needs = {torch.bfloat16: "v4", torch.float16: "v4_amx"}
    return dtype not in needs or needs[dtype] in SUPPORTED


def _load(isa: str | None) -> ModuleType | None:
    if isa is None:
        return None
    return importlib.import_module(f"bigops._native_{isa}")


# Any: the extension's functions are bound at build time and differ per op.
kernels: Any = _load(ISA)


def why_not() -> str | None:
    """None when the native kernels can run here, else the reason."""
    return REASON
