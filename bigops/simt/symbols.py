"""What a kernel's shared object tells of itself: its functions, their parameters, and the lines
that findings are about."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = (  # bigops::simt::Finding
    "race",
    "never written",
    "out of bounds",
    "misaligned",
    "not reached",
    "mismatch",
    "deadlock",
    "missing fence",
    "misuse",
    "bank conflict",
    "sanitizer",  # AddressSanitizer or UndefinedBehaviorSanitizer, in their words (apart.py)
)
SMALL_FLOATS = {
    "__half": "bigops::simt::SmallFloat<bigops::simt::HalfFormat>",
    "__nv_bfloat16": "bigops::simt::SmallFloat<bigops::simt::Bf16Format>",
}


@dataclass(frozen=True)
class Finding:
    """Something wrong in a kernel: the first of its kind at these lines, and how often there were
    others."""

    kind: str  # of KINDS
    message: str
    block: tuple[int, int, int] = (0, 0, 0)
    thread: tuple[int, int, int] = (0, 0, 0)
    times: int = 1

    def __str__(self) -> str:
        often = f" ({self.times} times)" if self.times > 1 else ""
        return f"{self.kind}: {self.message}; block {self.block}, thread {self.thread}{often}"

    __repr__ = __str__


@dataclass(frozen=True)
class Function:
    name: str
    offset: int
    parameters: tuple[str, ...] | None  # None: extern "C", which tells no types


class Symbols:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._functions: list[Function] | None = None
        self._shared: list[tuple[int, int, str]] = []  # offset, size, name
        self._lines: dict[str, str] = {}

    def function(self, name: str) -> Function:
        """The one function of this name, with or without its namespaces."""
        self._read()
        assert self._functions is not None
        wanted = re.sub(r"\b(__half|__nv_bfloat16)\b", lambda m: SMALL_FLOATS[m[1]], name)
        wanted = wanted.replace(" ", "")
        named = [f for f in self._functions if f.name == wanted or f.name.endswith(f"::{wanted}")]
        exact = [f for f in named if f.name == wanted]
        named = exact if len(exact) == 1 else named
        if len(named) == 1:
            return named[0]
        if named:
            raise ValueError(f"{name!r} is the name of {len(named)} functions: {named}")
        bare = wanted.partition("<")[0].rpartition("::")[2]
        near = sorted({f.name for f in self._functions if bare in f.name})
        hint = f"; there is {', '.join(near[:6])}" if near else ""
        raise ValueError(f"there is no function {name!r} in {self._file.name}{hint}")

    def _read(self) -> None:
        if self._functions is not None:
            return
        rows = []
        for line in _output(["readelf", "-sW", str(self._file)]).splitlines():
            words = line.split()  # Num: Value Size Type Bind Vis Ndx Name
            # A dot is in the names of parts that the compiler made of functions.
            if len(words) == 8 and words[3] in ("FUNC", "TLS") and "." not in words[7]:
                if words[6] == "UND":
                    continue
                rows.append((words[3], int(words[1], 16), int(words[2], 0), words[7]))
        names = _output(["c++filt"], "\n".join(row[3] for row in rows)).splitlines()
        functions = {}
        for (kind, offset, size, mangled), plain in zip(rows, names, strict=True):
            if kind == "TLS":
                name = plain.rpartition("::")[2]
                self._shared.append((offset, size, name))
            elif plain == mangled:
                functions[offset, plain] = Function(plain, offset, None)
            else:
                name, parameters = _signature(plain)
                functions[offset, name] = Function(name, offset, parameters)
        self._shared.sort()
        self._functions = list(functions.values())

    def findings(self, text: str) -> list[Finding]:
        """What bigops_simt_take_findings returned, with lines and names."""
        records = [record.split("\x1f") for record in text.split("\x1e") if record]
        if not records:
            return []
        self._read()
        self._look_up({at for *_, message in records for at in re.findall(r"\{(\w+)\}", message)})
        found = []
        for *numbers, message in records:
            kind, bx, by, bz, tx, ty, tz, times = map(int, numbers)
            message = re.sub(r"\{(\w+)\}", lambda match: self._lines[match[1]], message)
            message = re.sub(r"__shared__ memory \[(\d+)\]", self._shared_name, message)
            found.append(Finding(KINDS[kind], message, (bx, by, bz), (tx, ty, tz), times))
        return found

    def _shared_name(self, match: re.Match[str]) -> str:
        at = int(match[1])
        for offset, size, name in self._shared:
            if offset <= at < offset + size:
                return f"__shared__ {name}, byte {at - offset} of {size}"
        return match[0]

    def _look_up(self, places: set[str]) -> None:
        """addr2line's answer: `0xADDRESS`, then pairs of lines, a function and a place; of what was
        inlined the innermost first."""
        fresh = sorted(places - self._lines.keys())
        if not fresh:
            return
        command = ["addr2line", "-a", "-i", "-f", "-C", "-e", str(self._file), *fresh]
        blocks = re.split(r"^0x", _output(command), flags=re.MULTILINE)[1:]
        for at, block in zip(fresh, blocks, strict=True):
            lines = block.splitlines()[1:]
            self._lines[at] = _line(lines[1::2])


def _line(frames: Sequence[str]) -> str:
    """The innermost line that is not the model's; of a device header's, who called it too."""
    frames = [frame.partition(" (discriminator")[0] for frame in frames]
    outside = [frame for frame in frames if "/simt/" not in frame] or list(frames[-1:])
    callers = [frame for frame in outside if "/cuda/device/" not in frame]
    line = outside[0].rpartition("/")[2]
    if callers and callers[0] != outside[0]:
        line += f" (from {callers[0].rpartition('/')[2]})"
    return line


def _signature(plain: str) -> tuple[str, tuple[str, ...]]:
    """`void a::f<int>(T*, int) [clone]` -> a::f<int>, (T*, int)."""
    plain = plain.replace("(anonymous namespace)::", "").replace("{", "<").replace("}", ">")
    depth, close = 0, plain.rfind(")")
    opening = close
    for opening in range(close, -1, -1):
        depth += {")": 1, "(": -1}.get(plain[opening], 0)
        if depth == 0:
            break
    head, inside = plain[:opening], plain[opening + 1 : close]
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(inside + ","):
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[start:i].strip())
            start = i + 1
    # A template's return type stands before its name.
    depth, begin = 0, 0
    for i, letter in enumerate(head):
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(letter, 0)
        if letter == " " and depth == 0:
            begin = i + 1
    return head[begin:].replace(" ", ""), tuple(part for part in parts if part)


def _output(command: list[str], text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
