"""Compiles Triton kernels without a GPU and reads what came out: `python tests/triton_compile.py`.

The real launchers run on CPU tensors, with a driver that only names the target and a launch that
only compiles, so what is compiled is what a call would launch: the same configuration, the same
specialisation on strides and alignment. ptxas, cuobjdump and nvdisasm come with Triton's wheel.

Each line on the standard output is one compilation, as JSON. The interpreter and the compiler
cannot share a process, so TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import attention

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Matrix instructions, by the name that the machine code gives them.
MATRIX = {"HMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}


class Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def read(kernel: Any) -> dict[str, Any]:
    """Registers, local memory, shared memory and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    counts = {name: len(re.findall(rf"\b{sass}\b", code)) for sass, name in MATRIX.items()}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "spill_stores": len(re.findall(r"\bSTL\b", code)),
        "shared": kernel.metadata.shared,
        "tf32": "TF32" in code,
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128|LDGSTS\S*\.128", code)),
        **{name: count for name, count in counts.items() if count},
    }


def compiled(capability: int, call: Any) -> Iterator[tuple[str, Any]]:
    """The kernels that a call would launch on a GPU of this capability."""
    triton.runtime.driver.set_active(Driver(capability))
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((self.fn.__name__, run(self, *args, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    yield from found


def attention_case(case: str) -> Iterator[tuple[str, Any]]:
    """case: capability,dtype,head size,value's head size,diagonal or None."""
    capability, name, head, head_v, bound = case.split(",")
    dtype, diagonal = DTYPES[name], None if bound == "None" else int(bound)
    row = {80: "sm80", 90: "sm90", 100: "sm100"}.get(int(capability), "sm86")
    attention.config_row = lambda _: "fp32" if dtype == torch.float32 else row

    def tensor(heads: int, size: int) -> torch.Tensor:
        return torch.empty(1, heads, 256, size, dtype=dtype)

    def call() -> None:
        query, key, value = tensor(4, int(head)), tensor(2, int(head)), tensor(2, int(head_v))
        out, lse = attention.forward(query, key, value, None, diagonal, 0.125)
        inputs = (query, key, value, None, out, lse, diagonal, 0.125)
        attention.backward(out, lse, *inputs, needs=(True, True, True))

    return compiled(int(capability), call)


def main(cases: list[str]) -> None:
    for case in cases:
        for name, kernel in attention_case(case):
            print(json.dumps({"case": case, "kernel": name, **read(kernel)}), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") in (None, "", "0")
    main(sys.argv[1:])
