"""Rung 6 of the ladder: nvcc compiles every CUDA C++ kernel, and ptxas tells what became of it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bigops.ledger import nvcc

# Spills that are known and accepted, by kernel, with the reason.
SPILLS: dict[str, str] = {}

pytestmark = pytest.mark.skipif(nvcc.nvcc_version() is None, reason="nvcc is not installed")


def test_there_is_something_to_build() -> None:
    assert "adam.cu" in [source.name for source in nvcc.sources()]


@pytest.mark.parametrize("source", nvcc.sources(), ids=lambda path: path.name)
def test_nvcc_builds(source: Path, tmp_path: Path) -> None:
    built = tmp_path / f"{source.stem}.o"
    try:
        text = nvcc.build(source, built)
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr[-4000:])
    assert built.stat().st_size > 0
    report = nvcc.plainly_named(nvcc.ptxas_report(text, source))
    architectures = {kernel.target for kernel in report}
    hopper_only = nvcc.gencode(source) == nvcc.HOPPER_ONLY
    assert architectures == ({"sm_90a"} if hopper_only else {"sm_80", "sm_90", "sm_100"})
    for kernel in report:
        assert kernel.registers <= 255
        assert kernel.spills == 0 or kernel.kernel in SPILLS, kernel
    version, recorded = nvcc.recorded()
    if version == nvcc.nvcc_version():
        ours = [kernel for kernel in recorded if kernel.source == source.name]
        assert ours == report, "kernels/ledger/cuda.txt: run `bigops inspect --update`"


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")
def test_adam_moves_16_bytes_at_a_time(tmp_path: Path) -> None:
    built = tmp_path / "adam.cubin"
    source = str(nvcc.SOURCES / "adam.cu")
    subprocess.run(
        ["nvcc", "-std=c++20", "-O3", "-arch=sm_90", "-cubin", source, "-o", str(built)], check=True
    )
    code = subprocess.run(
        [str(cuobjdump()), "-sass", str(built)], capture_output=True, text=True, check=True
    ).stdout
    functions = code.split("Function : ")[1:]
    assert len(functions) == 7  # three dtypes, with and without AMSGrad, and the norm
    for function in functions:
        reads, writes = (len(re.findall(rf"\b{op}\.E\S*128", function)) for op in ("LDG", "STG"))
        assert reads >= 1, function[:200]
        assert writes >= 3 or "grad_norm" in function[:200], function[:200]
