"""Dynamic shared memory of the CUDA C++ kernels: what their launchers ask for, which no object file
tells. It is a constant of the type that a kernel is a template over, so a program prints it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..backends.flags import NVCC

PROGRAM = """\
{includes}
#include <cstdio>
{namespaces}
int main() {{
    const int bytes[] = {{{bytes}}};
    for (int each : bytes) std::printf("%d\\n", each);
}}
"""


def dynamic_shared(source: Path, kernels: Iterable[str]) -> dict[str, int]:
    """Bytes of a block, by the name of the kernel; only of kernels over a type of tiles.

    Raises:
        subprocess.CalledProcessError: nvcc refuses the program; its `stderr` says why.
    """
    found = ((kernel, re.search(r"_kernel<(\w+Tiles<[^>]*>)", kernel)) for kernel in kernels)
    tiles = {kernel: match[1] for kernel, match in found if match is not None}
    types = sorted(set(tiles.values()))
    if not types:
        return {}
    headers = [source.parent / n for n in re.findall(r'#include "([^"]+)"', source.read_text())]
    spaces = {n for h in headers for n in re.findall(r"^namespace (\S+) {", h.read_text(), re.M)}
    text = PROGRAM.format(
        includes="\n".join(f'#include "{header}"' for header in headers),
        namespaces="\n".join(f"using namespace {space};" for space in sorted(spaces)),
        bytes=", ".join(f"{type_}::kSharedBytes" for type_ in types),
    )
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "bytes.cu"
        program.write_text(text)
        command = ["nvcc", *NVCC.split(), "-run", str(program), "-o", str(program.with_suffix(""))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    bytes_ = dict(zip(types, map(int, done.stdout.split()), strict=True))
    return {kernel: bytes_[type_] for kernel, type_ in tiles.items()}
