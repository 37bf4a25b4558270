"""Entries of the ledger, and the files that keep them: kernels/ledger/<kernel file>.txt.

A file is a comment, a line of column names and a line per entry; columns are two spaces or more
apart, "-" is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from .architectures import ARCHITECTURES, Occupancy, occupancy
from .launches import Launch

HEADER = """\
# What became of the Triton kernels of {name}: a line for each kernel, call and GPU.
# Written by Triton {version}. `bigops inspect --update` compiles what changed and writes it anew.
#
# call, dtype, step: what launches the kernel: calls are declared in bigops/ops/configurations.py,
#   which says what they stand for; tf32 is fp32 with torch's flags for TF32 set.
# key: a hash of the kernel's source, its arguments' types and alignment, its configuration and the
#   GPU. registers: of a thread; on AMD's all vector registers, agpr of them accumulators, and sgpr
#   scalar ones. spills, shared: bytes, of a thread and of a program. in_loops: accesses to spilled
#   values within loops. tensor_memory: columns.
# matrix: matrix instructions in the machine code. wants: the best kind that its products can have.
# load, store: bits of the widest access to global memory, 128 by tensor descriptors.
# tf32: whether products use it.
# occupancy: warps on a multiprocessor, of those that it can hold, and what limits them.
"""
COLUMNS = (
    "kernel", "op", "call", "dtype", "step", "target", "key", "registers", "agpr", "sgpr",
    "spills", "in_loops", "shared", "tensor_memory", "matrix", "wants", "load", "store", "tf32",
    "occupancy", "config",
)  # fmt: skip
ABSENT = {"agpr", "sgpr", "in_loops"}  # numbers that only some GPUs have
NUMBERS = {"registers", "spills", "shared", "tensor_memory", "load", "store", *ABSENT}
Name = tuple[str, str, str, str, str, str]


@dataclass(frozen=True)
class Entry:
    """One kernel as one call launches it on one GPU; the fields are those of a file's columns."""

    kernel: str
    op: str
    call: str
    dtype: str
    step: str
    target: str
    key: str
    registers: int
    agpr: int | None
    sgpr: int | None
    spills: int
    in_loops: int | None
    shared: int
    tensor_memory: int
    matrix: str
    wants: str
    load: int
    store: int
    tf32: bool
    config: str

    @property
    def name(self) -> Name:
        """What stays when the kernel changes."""
        return self.kernel, self.op, self.call, self.dtype, self.step, self.target

    @property
    def warps(self) -> int:
        found = re.search(r"\bwarps=(\d+)", self.config)
        assert found is not None
        return int(found[1])

    @property
    def occupancy(self) -> Occupancy:
        return occupancy(
            ARCHITECTURES[self.target], self.registers, self.shared, self.warps, self.tensor_memory
        )

    @property
    def matrix_counts(self) -> dict[str, int]:
        """How many matrix instructions of each kind."""
        pairs = [kind.split(":") for kind in self.matrix.split(",") if kind]
        return {kind: int(count) for kind, count in pairs}

    def cells(self) -> list[str]:
        """The entry as words, in the order of COLUMNS."""
        fits = self.occupancy
        words = asdict(self) | {
            "tf32": "yes" if self.tf32 else "",
            "tensor_memory": self.tensor_memory or "",
            "occupancy": f"{fits.percent}% {fits.limit}" if fits.programs else "does not fit",
        }
        return ["-" if words[c] in ("", None) else str(words[c]) for c in COLUMNS]


def entry(words: dict[str, Any]) -> Entry:
    """An entry of its fields, as text or as JSON has them; others are left out."""
    found: dict[str, Any] = {}
    for column in Entry.__dataclass_fields__:
        value = words[column]
        if value == "-":
            value = None if column in ABSENT else "" if column not in NUMBERS else 0
        elif isinstance(value, str) and column in NUMBERS:
            value = int(value)
        found[column] = value
    found["tf32"] = found["tf32"] in (True, "yes")
    return Entry(**found)


def written(name: str, version: str, entries: Iterable[Entry]) -> str:
    """The file of the kernels of `name`."""
    rows = [list(COLUMNS), *(e.cells() for e in entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return HEADER.format(name=name, version=version) + "\n".join(lines) + "\n"


def read(text: str) -> tuple[str, list[Entry]]:
    """Triton's version and the entries of a file.

    Raises:
        ValueError: it is not a file of the ledger.
    """
    version = re.search(r"^# Written by Triton (\S+)\. ", text, re.M)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    if version is None or not lines:
        raise ValueError("not a file of the ledger")
    columns = lines[0].split()
    rows = [re.split(r"\s{2,}", line) for line in lines[1:]]
    return version[1], [entry(dict(zip(columns, row, strict=True))) for row in rows]


def folder() -> Path:
    """Where the files are: kernels/ledger, installed or not."""
    return Path(str(files("bigops.kernels"))) / "ledger"


def recorded() -> dict[str, tuple[str, list[Entry]]]:
    """The files that came with this installation: Triton's version and entries by name."""
    return {
        path.stem: read(path.read_text())
        for path in sorted(folder().glob("*.txt"))
        if path.name != "cuda.txt"
    }


def all_recorded() -> list[Entry]:
    """The entries of all files."""
    return [e for _, entries in recorded().values() for e in entries]


N = TypeVar("N", Entry, Launch)


def choose(
    found: Sequence[N], words: Sequence[str], op: str | None, target: str | None, call: str
) -> list[N]:
    """Those of these ops or kernels (all without words), of `op`, on `target`, of such a call."""
    return [
        one
        for one in found
        if (not words or one.kernel in words or one.op in words)
        and op in (None, one.op)
        and target in (None, one.target)
        and call in f"{one.call}, {one.dtype}, {one.step}"
    ]
