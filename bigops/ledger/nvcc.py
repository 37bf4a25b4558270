"""What becomes of the CUDA C++ kernels: ptxas' report, what their machine code holds, and
kernels/ledger/cuda.txt, which keeps both.

The file is written where nvcc, cuobjdump and the sources are, and stays as recorded elsewhere. A
source is compiled anew only if it, or what it includes, has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..backends.flags import NVCC, gencode
from .entries import folder
from .machine_code import (
    LOCAL,
    MATRIX,
    NVIDIA_LOAD,
    NVIDIA_STORE,
    addresses,
    instructions,
    loops,
    widest,
)
from .nvcc_shared import dynamic_shared

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
MODEL = ROOT / "csrc" / "simt"  # the device header's other side, which nvcc does not see
CACHE = ROOT / "build" / "ledger"  # what was compiled and is not in cuda.txt yet
# What is not named in braces is zero, which is meant; and GCC 12 warns of the concatenation of
# strings (its bug 105651).
STRICT = (
    "--Werror=all-warnings",
    "-Xcompiler=-Wall,-Wextra,-Werror,-Wno-missing-field-initializers,-Wno-restrict",
    "-Xptxas=-v",
)
HEADER = """\
# What became of the CUDA C++ kernels in csrc/cuda, built by nvcc {version}.
# `bigops inspect --update` compiles what changed and writes it anew where nvcc is.
#
# key: a hash of the source, of what it includes and of nvcc's options. registers: of a thread.
#   spills, shared: bytes, of a thread (stores and loads) and of a block (what launchers ask for
#   included). in_loops: accesses to local memory within inner loops.
# matrix: matrix instructions in the machine code. copies: instructions of the copy engine (TMA).
# load, store: bits of the widest access to global memory by a thread.
#
# A core's seconds to build each file, which is built on several at once:
"""
TARGETS = ("sm_80", "sm_90", "sm_90a", "sm_100")
COLUMNS = (
    "source", "kernel", "target", "key", "registers", "spills", "in_loops", "shared", "matrix",
    "copies", "load", "store",
)  # fmt: skip
NUMBERS = ("registers", "spills", "in_loops", "shared", "copies", "load", "store")
COPY_ENGINE = r"\b(?:UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)\b"


@dataclass(frozen=True)
class CudaKernel:
    """One kernel on one architecture; the fields are those of the file's columns."""

    source: str
    kernel: str
    target: str
    key: str
    registers: int
    spills: int
    shared: int
    in_loops: int = 0
    matrix: str = ""
    copies: int = 0
    load: int = 0
    store: int = 0

    @property
    def op(self) -> str:
        """The op that the file is named after."""
        return re.sub(r"(_backward(_prepare)?)?(_sm\d+)?\.cu$", "", self.source)


class Built(NamedTuple):
    """What a source file became, and the seconds of a core that it took."""

    kernels: list[CudaKernel]
    seconds: int


def sources() -> list[Path]:
    """The .cu files; none in an installed wheel."""
    return sorted(SOURCES.glob("*.cu"))


def build(source: Path, built: Path) -> tuple[str, float]:
    """Compile a .cu file with every warning an error; what ptxas reports, and a core's seconds.

    Raises:
        subprocess.CalledProcessError: nvcc refuses it; its `stderr` says why.
    """
    command = ["nvcc", *NVCC.split(), *STRICT, *gencode(source.stem)]
    command += ["-c", str(source), "-o", str(built)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command, text, text)
    return text, usage.ru_utime + usage.ru_stime


def measured(source: Path) -> Built:
    """A file's kernels as they are compiled now.

    Raises:
        subprocess.CalledProcessError: nvcc refuses it; its `stderr` says why.
    """
    key, version = source_key(source), nvcc_version()
    cached = CACHE / f"{source.stem}-{key}-{version}.json"
    if cached.exists():
        found = json.loads(cached.read_text())
        return Built([CudaKernel(**kernel) for kernel in found["kernels"]], found["seconds"])
    with tempfile.TemporaryDirectory() as place:
        built = Path(place) / "built.o"
        text, seconds = build(source, built)
        code = machine_code(built)
    kernels = [
        replace(kernel, key=key, **contents(code[kernel.target, kernel.kernel]))
        for kernel in ptxas_report(text, source)
    ]
    kernels = plainly_named(kernels)
    asked = dynamic_shared(source, [kernel.kernel for kernel in kernels])
    kernels = [replace(k, shared=k.shared + asked.get(k.kernel, 0)) for k in kernels]
    result = Built(kernels, round(seconds))
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{source.stem}-*.json"):
        old.unlink(missing_ok=True)
    content = {"kernels": [asdict(kernel) for kernel in result.kernels], "seconds": result.seconds}
    cached.write_text(json.dumps(content))
    return result


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


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    if found := shutil.which("cuobjdump"):
        return found
    if triton is None or triton.origin is None:
        return None
    return shutil.which(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin/cuobjdump"))


def machine_code(built: Path) -> dict[tuple[str, str], str]:
    """SASS of an object's kernels, by architecture and (mangled) name."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump: neither the CUDA toolkit's nor Triton's is here")
    done = subprocess.run([tool, "-sass", built], capture_output=True, text=True, check=True)
    found = {}
    for part in re.split(r"^arch = ", done.stdout, flags=re.M)[1:]:
        target = part.split(maxsplit=1)[0]
        for function in re.split(r"^\s*Function : ", part, flags=re.M)[1:]:
            name, _, code = function.partition("\n")
            found[target, name.strip()] = code
    return found


def contents(code: str) -> dict[str, Any]:
    """What a kernel's machine code holds, by CudaKernel's fields."""
    counts = {kind: len(re.findall(rf"\b{name}\b", code)) for kind, name in MATRIX.items()}
    return {
        "in_loops": _in_inner_loops(code),
        "matrix": ",".join(f"{kind}:{count}" for kind, count in counts.items() if count),
        "copies": len(re.findall(COPY_ENGINE, code)),
        "load": widest(re.findall(NVIDIA_LOAD, code)),
        "store": widest(re.findall(NVIDIA_STORE, code)),
    }


def _in_inner_loops(code: str) -> int:
    """Accesses to local memory within loops that hold no other; where there are matrix
    instructions, only loops that hold one count, as waiting for a barrier is a loop too."""
    found = instructions(code)
    own = set(loops(found))
    matrix = addresses("|".join(rf"\b{name}\b" for name in MATRIX.values()), found)
    if matrix:
        own = {(a, b) for a, b in own if any(a <= m <= b for m in matrix)}
    inner = [
        (a, b)
        for a, b in own
        if not any(a <= first and last <= b and (first, last) != (a, b) for first, last in own)
    ]
    return sum(any(a <= address <= b for a, b in inner) for address in addresses(LOCAL, found))


def source_key(source: Path) -> str:
    """A hash of nvcc's options, a .cu file and all that it includes with quotes but the CPU model;
    comments and spaces aside."""
    parts: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop().resolve()
        if path in parts:
            continue
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(), flags=re.S)
        parts[path] = " ".join(text.split())
        for name in re.findall(r'#\s*include\s+"([^"]+)"', text):
            places = ((folder / name).resolve() for folder in (path.parent, *path.parents[:2]))
            waiting += [place for place in places if place.exists() and MODEL not in place.parents][
                :1
            ]
    options = " ".join((NVCC, *gencode(source.stem)))
    text = "\n".join([options, *(parts[path] for path in sorted(parts))])
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


def written(version: str, built: dict[str, Built]) -> str:
    """The text of cuda.txt."""
    times = [f"#   {name}: {built[name].seconds}" for name in sorted(built)]
    cells = [
        [str(getattr(kernel, column)) or "-" for column in COLUMNS]
        for name in sorted(built)
        for kernel in built[name].kernels
    ]
    rows = [list(COLUMNS), *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return HEADER.format(version=version) + "\n".join([*times, *lines]) + "\n"


def recorded() -> tuple[str, list[CudaKernel]]:
    """nvcc's version and the kernels of cuda.txt."""
    version, built = recorded_files()
    return version, [kernel for file in built.values() for kernel in file.kernels]


def recorded_files() -> tuple[str, dict[str, Built]]:
    """nvcc's version, and what cuda.txt says of each file."""
    text = (folder() / "cuda.txt").read_text()
    version = re.search(r"built by nvcc (\S+)\.$", text, re.M)
    assert version is not None
    seconds = re.findall(r"^#   (\S+\.cu): (\d+)$", text, re.M)
    found = {name: Built([], int(time)) for name, time in seconds}
    names, *lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in lines:
        cells = dict(zip(names.split(), re.split(r"\s{2,}", line), strict=True))
        values: dict[str, Any] = {k: "" if v == "-" else v for k, v in cells.items()}
        values |= {name: int(values[name]) for name in NUMBERS}
        found[values["source"]].kernels.append(CudaKernel(**values))
    return version[1], found


def nvcc_version() -> str | None:
    """The version of the nvcc that is here."""
    if shutil.which("nvcc") is None:
        return None
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release \S+, V(\S+)", done.stdout)
    return found[1] if found else None


def changed(version: str | None) -> list[Path]:
    """The sources of which cuda.txt says nothing, or what no longer holds for this nvcc."""
    recorded_by, built = recorded_files()
    keys = {kernel.source: kernel.key for file in built.values() for kernel in file.kernels}
    same = recorded_by == version
    return [s for s in sources() if not same or keys.get(s.name) != source_key(s)]


def renewed(progress: Callable[[str, int, int], None]) -> tuple[str, list[str]] | None:
    """cuda.txt as it should be, and the files that were compiled for it; None without nvcc or the
    sources.

    Raises:
        subprocess.CalledProcessError: nvcc refuses a file; its `stderr` says why.
    """
    version = nvcc_version()
    if version is None or cuobjdump() is None or not sources():
        return None
    new = changed(version)
    known = recorded_files()[1]
    built = {s.name: known[s.name] for s in sources() if s not in new}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(measured, source): source for source in new}
        for i, done in enumerate(as_completed(running), 1):
            built[running[done].name] = done.result()
            progress(f"nvcc {running[done].name}", i, len(new))
    return written(version, built), [source.name for source in new]
