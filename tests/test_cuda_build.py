"""Rung 6 of the ladder: nvcc compiles every CUDA C++ kernel, and ptxas tells what became of it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
NVCC = shutil.which("nvcc")
# sm_90a's instructions assemble for nothing else; all other files are built for every architecture,
# with PTX of the oldest for those to come.
HOPPER_ONLY = ("-gencode=arch=compute_90a,code=sm_90a",)
EVERYWHERE = (
    *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)),
    "-gencode=arch=compute_80,code=compute_80",
)
# Spills that are known and accepted, by kernel, with the reason.
SPILLS: dict[str, str] = {}

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def ptxas_report(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> registers and spills, out of what `-Xptxas -v` prints."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    kernel = ("", "")
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = (entry[1], entry[2])
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[kernel] = {"spills": int(spills[1]) + int(spills[2])}
        elif registers := re.search(r"Used (\d+) registers", line):
            found[kernel]["registers"] = int(registers[1])
    return found


def test_there_is_something_to_build() -> None:
    assert "adam.cu" in [source.name for source in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_builds(source: Path, tmp_path: Path) -> None:
    assert NVCC is not None
    targets = HOPPER_ONLY if source.stem.endswith("_sm90") else EVERYWHERE
    built = tmp_path / f"{source.stem}.o"
    command = [NVCC, "-std=c++20", "-O3", "--threads=2", "--Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v", *targets, "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(built)], capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert built.stat().st_size > 0
    report = ptxas_report(done.stderr + done.stdout)
    architectures = {architecture for _, architecture in report}
    assert architectures == {"sm_90a"} if targets is HOPPER_ONLY else {"sm_80", "sm_90", "sm_100"}
    for (kernel, architecture), usage in report.items():
        print(f"{kernel} {architecture}: {usage}")
        assert usage["registers"] <= 255
        accepted = any(name in kernel for name in SPILLS)
        assert usage["spills"] == 0 or accepted, (kernel, architecture, usage)


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")
def test_adam_moves_16_bytes_at_a_time(tmp_path: Path) -> None:
    assert NVCC is not None
    built = tmp_path / "adam.cubin"
    source = str(CUDA / "adam.cu")
    subprocess.run(
        [NVCC, "-std=c++20", "-O3", "-arch=sm_90", "-cubin", source, "-o", str(built)], check=True
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
