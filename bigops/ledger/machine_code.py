"""What a compiled kernel is made of, read from its machine code.

cuobjdump and nvdisasm come with Triton's wheel; AMD's assembly carries its own figures.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .architectures import Architecture

# Instructions of the matrix units, by the names that the machine code gives them.
MATRIX = {
    "mma": r"[HIQDO]MMA",
    "wgmma": r"[HIQ]GMMA",
    "tcgen05": r"UTC[HIQO]MMA",
    "mfma": r"v_s?mfmac?_\w+",
}
LOCAL = r"\b(?:STL|LDL)\b"
TMA_LOAD = "UTMALDG"  # of whole rows of a tile
NVIDIA_LOAD, NVIDIA_STORE = r"\b(?:LDG|LDGSTS)\.(\S+)", r"\bSTG\.(\S+)"
AMD_ACCESS = r"\b(?:global|buffer|flat)_{}_(\w+)"
AMD_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}
PRODUCT = re.compile(
    r"tt\.dot(.*) : tensor<(?:\d+x)+(\w+)> \* .* -> tensor<(?:\d+x)*?(\d+)x\d+x\w+>"
)


def read(kernel: Any, architecture: Architecture) -> dict[str, Any]:
    """The figures of an entry, by its field names."""
    figures = _amd(kernel) if architecture.amd else _nvidia(kernel)
    code = figures.pop("code")
    counts = {kind: len(re.findall(rf"\b{name}\b", code)) for kind, name in MATRIX.items()}
    return {
        **figures,
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "warps": kernel.metadata.num_warps,
        "matrix": ",".join(f"{kind}:{count}" for kind, count in counts.items() if count),
        "wants": wanted(kernel.asm["ttir"], architecture, kernel.metadata.num_warps),
    }


def machine_code(kernel: Any, architecture: Architecture) -> str:
    """SASS, or AMD's assembly."""
    return str(kernel.asm["amdgcn"]) if architecture.amd else _cuobjdump(kernel, "-sass")


def intermediate(kernel: Any, architecture: Architecture) -> str:
    """PTX, or LLVM's IR, from which AMD's assembly is made."""
    return str(kernel.asm["llir" if architecture.amd else "ptx"])


def _nvidia(kernel: Any) -> dict[str, Any]:
    usage, code = _cuobjdump(kernel, "-res-usage"), _cuobjdump(kernel, "-sass")
    return {
        "code": code,
        "registers": _number(r"REG:(\d+)", usage),
        "agpr": None,
        "sgpr": None,
        # Triton's kernels have no arrays of their own: what lies on the stack was spilled.
        "spills": _number(r"STACK:(\d+)", usage),
        "in_loops": in_loops(code),
        "load": 128 if TMA_LOAD in code else widest(re.findall(NVIDIA_LOAD, code)),
        "store": widest(re.findall(NVIDIA_STORE, code)),
        # On sm_100 only PTX says what a matrix instruction's operands are.
        "tf32": "tf32" in kernel.asm["ptx"],
    }


def in_loops(code: str) -> int:
    """Accesses to local memory between a branch backwards and its target."""
    found = instructions(code)
    return sum(
        any(first <= address <= last for first, last in loops(found))
        for address in addresses(LOCAL, found)
    )


def instructions(code: str) -> list[tuple[int, str]]:
    """Addresses and texts of SASS."""
    return [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]


def loops(found: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """From where to where branches go backwards."""
    return [
        (int(target, 16), address)
        for address, text in found
        for target in re.findall(r"\bBRA\S* .*?0x([0-9a-f]+)", text)
        if int(target, 16) < address
    ]


def addresses(pattern: str, found: Sequence[tuple[int, str]]) -> list[int]:
    """Of the instructions that hold a pattern."""
    return [address for address, text in found if re.search(pattern, text)]


def _cuobjdump(kernel: Any, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def widest(suffixes: Iterable[str]) -> int:
    """Bits of the widest access: 32 where nothing is said."""
    bits = [0]
    for suffix in suffixes:
        said = re.findall(r"\b[US]?(8|16|64|128|256)\b", suffix)
        bits.append(int(said[-1]) if said else 32)
    return max(bits)


def _amd(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]
    return {
        "code": code,
        "registers": _number(r"\.vgpr_count:\s+(\d+)", code),
        "agpr": _number(r"\.agpr_count:\s+(\d+)", code),
        "sgpr": _number(r"\.sgpr_count:\s+(\d+)", code),
        "spills": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code),
        "in_loops": None,
        "load": max(map(_amd_bits, re.findall(AMD_ACCESS.format("load"), code)), default=0),
        "store": max(map(_amd_bits, re.findall(AMD_ACCESS.format("store"), code)), default=0),
        "tf32": "xf32" in code,
    }


def _amd_bits(suffix: str) -> int:
    if words := re.search(r"dword(?:x(\d))?", suffix):
        return 32 * int(words[1] or 1)
    return next((bits for name, bits in AMD_BITS.items() if name in suffix), 0)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what the compiler reports")
    return int(found[1])


def wanted(ttir: str, architecture: Architecture, warps: int) -> str:
    """The best matrix instruction that a product of the kernel can have there, or nothing.

    IEEE products of fp32 have none on NVIDIA's. wgmma and tcgen05 take 64 rows at least and whole
    groups of 4 warps; smaller tiles fall back on mma.
    """
    rows = []
    for said, operand, count in PRODUCT.findall(ttir):
        if architecture.amd or operand != "f32" or "= tf32" in said:
            rows.append(int(count))
    if not rows:
        return ""
    if architecture.amd:
        return "mfma"
    if architecture.capability >= 90 and max(rows) >= 64 and warps % 4 == 0:
        return "wgmma" if architecture.capability < 100 else "tcgen05"
    return "mma"
