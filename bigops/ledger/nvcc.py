"""What nvcc's ptxas reports of the CUDA C++ kernels, and kernels/ledger/cuda.txt, which keeps it.

The file is written where nvcc and the sources are, and stays as recorded elsewhere.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .entries import folder

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
# sm_90a's instructions assemble for nothing else; all other files are built for every architecture,
# with PTX of the oldest for those to come.
HOPPER_ONLY = ("-gencode=arch=compute_90a,code=sm_90a",)
EVERYWHERE = (
    *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)),
    "-gencode=arch=compute_80,code=compute_80",
)
HEADER = """\
# What ptxas reports of the CUDA C++ kernels in csrc/cuda, built by nvcc {version}.
# `bigops inspect --update` writes it anew where nvcc is.
#
# key: a hash of the source and of what it includes. registers: of a thread. spills, shared: bytes,
#   of a thread (stores and loads) and of a program.
"""
TARGETS = ("sm_80", "sm_90", "sm_90a", "sm_100")
COLUMNS = ("source", "kernel", "target", "key", "registers", "spills", "shared")


@dataclass(frozen=True)
class CudaKernel:
    """ptxas' figures of one kernel on one architecture."""

    source: str
    kernel: str
    target: str
    key: str
    registers: int
    spills: int
    shared: int

    @property
    def op(self) -> str:
        """The op that the file is named after."""
        return re.sub(r"(_sm\d+)?\.cu$", "", self.source)


def gencode(source: Path) -> tuple[str, ...]:
    """nvcc's options for the architectures that a file is built for."""
    return HOPPER_ONLY if source.stem.endswith("_sm90") else EVERYWHERE


def sources() -> list[Path]:
    """The .cu files; none in an installed wheel."""
    return sorted(SOURCES.glob("*.cu"))


def build(source: Path, built: Path) -> str:
    """Compile a .cu file with every warning an error, and return what ptxas reports.

    Raises:
        subprocess.CalledProcessError: nvcc refuses it; its `stderr` says why.
    """
    command = ["nvcc", "-std=c++20", "-O3", "--threads=2", "--Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v", *gencode(source)]
    command += ["-c", str(source), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600)
    return done.stderr + done.stdout


def ptxas_report(text: str, source: Path) -> list[CudaKernel]:
    """The kernels in what `-Xptxas=-v` prints."""
    found = []
    key, kernel, target, spills = source_key(source), "", "", 0
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel, target = entry[1], entry[2]
        elif bytes_ := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(bytes_[1]) + int(bytes_[2])
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(
                CudaKernel(
                    source.name, kernel, target, key, int(used[1]), spills,
                    int(shared[1]) if shared else 0,
                )
            )  # fmt: skip
    return found


def source_key(source: Path) -> str:
    """A hash of a .cu file and of all that it includes with quotes; comments and spaces aside."""
    parts: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop().resolve()
        if path in parts:
            continue
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(), flags=re.S)
        parts[path] = " ".join(text.split())
        for name in re.findall(r'#\s*include\s+"([^"]+)"', text):
            places = (folder / name for folder in (path.parent, *path.parents[:2]))
            waiting += [place for place in places if place.exists()][:1]
    text = "\n".join(parts[path] for path in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def plainly_named(kernels: Sequence[CudaKernel]) -> list[CudaKernel]:
    """The same in order, by names as C++ writes them, without namespaces and arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    names = [kernel.kernel for kernel in kernels]
    if tool is not None and names:
        done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
        names = [_plain(line) for line in done.stdout.splitlines()]
    named = [replace(k, kernel=name) for k, name in zip(kernels, names, strict=True)]
    return sorted(named, key=lambda k: (k.source, k.kernel, TARGETS.index(k.target)))


def _plain(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name.removeprefix("void "))
    return name.partition("(")[0]


def written(version: str, kernels: Iterable[CudaKernel]) -> str:
    """The text of cuda.txt."""
    cells = [[str(getattr(kernel, c)) for c in COLUMNS] for kernel in kernels]
    rows = [list(COLUMNS), *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return HEADER.format(version=version) + "\n".join(lines) + "\n"


def recorded() -> tuple[str, list[CudaKernel]]:
    """nvcc's version and the kernels of cuda.txt."""
    text = (folder() / "cuda.txt").read_text()
    found = re.search(r"built by nvcc (\S+)\.$", text, re.M)
    assert found is not None
    kernels = []
    for line in [line for line in text.splitlines() if not line.startswith("#")][1:]:
        words = re.split(r"\s{2,}", line)
        kernels.append(CudaKernel(*words[:4], *map(int, words[4:])))  # type: ignore[arg-type]
    return found[1], kernels


def nvcc_version() -> str | None:
    """The version of the nvcc that is here."""
    if shutil.which("nvcc") is None:
        return None
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release \S+, V(\S+)", done.stdout)
    return found[1] if found else None


def renewed() -> str | None:
    """cuda.txt as it should be; None without nvcc or the sources."""
    version = nvcc_version()
    if version is None or not sources():
        return None
    kernels: list[CudaKernel] = []
    with tempfile.TemporaryDirectory() as place:
        for source in sources():
            kernels += ptxas_report(build(source, Path(place) / "built.o"), source)
    return written(version, plainly_named(kernels))
