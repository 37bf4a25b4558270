"""The address build runs in a process of its own (csrc/simt/address_main.cpp, which describes what
is sent): memory goes there and back, each tensor's between red zones."""

from __future__ import annotations

import ctypes
import io
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .arguments import Call, Placed, Region
from .symbols import KINDS

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66:symbolize=1",
    "UBSAN_OPTIONS": "print_stacktrace=0:exitcode=66",
}
FOUND = 66
ALIGNMENT = 256  # of what is sent; a tensor that has less keeps what it has


def run(program: Path, file: Path, offset: int, call: Call, placed: Placed) -> tuple[str, str]:
    """The error, and the findings' text."""
    regions = _joined(placed.regions)
    call.function = offset
    request = io.BytesIO()
    path = os.fsencode(file)
    request.write(struct.pack("<Q", len(path)) + path + bytes(call))
    blocks = [(r.low, ctypes.string_at(r.low, r.size)) for r in regions]
    blocks += [(ctypes.addressof(s), bytes(s)) for s in placed.structures]
    request.write(struct.pack("<Q", len(blocks)))
    for low, content in blocks:
        request.write(struct.pack("<QQ", low % ALIGNMENT, len(content)) + content)
    pointers = list(_pointers(call, placed, blocks))
    request.write(struct.pack("<Q", len(pointers)))
    for pointer in pointers:
        request.write(struct.pack("<qQQQ", *pointer))
    done = subprocess.run(
        [str(program)],
        input=request.getvalue(),
        capture_output=True,
        check=False,
        env={**os.environ, **OPTIONS},
    )
    said = done.stderr.decode(errors="replace")
    if done.returncode == FOUND:
        return "", _found(said)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} ended with status {done.returncode}: {said[-2000:]}")
    answers = _parts(done.stdout)
    error, text, *contents = answers
    for (low, _), content in zip(blocks, contents, strict=True):
        ctypes.memmove(low, content, len(content))
    return error.decode(), text.decode()


def _joined(regions: list[Region]) -> list[Region]:
    """Tensors that share memory share it there too."""
    joined: list[Region] = []
    for region in sorted(regions, key=lambda r: r.low):
        if joined and region.low < joined[-1].low + joined[-1].size:
            end = max(joined[-1].low + joined[-1].size, region.low + region.size)
            joined[-1].size = end - joined[-1].low
        else:
            joined.append(Region(region.low, region.size, region.name))
    return joined


def _pointers(
    call: Call, placed: Placed, blocks: list[tuple[int, bytes]]
) -> Iterator[tuple[int, int, int, int]]:
    """(where: a block's number or -1 for the call, offset, what it points to: block, offset)"""
    starts = {low: i for i, (low, _) in enumerate(blocks)}
    for structure, offset in placed.pointers:
        target = ctypes.c_uint64.from_address(ctypes.addressof(structure) + offset).value
        where = -1 if structure is call else starts[ctypes.addressof(structure)]
        for i, (low, content) in enumerate(blocks):
            if low <= target < low + len(content):
                yield where, offset, i, target - low
                break


def _parts(answer: bytes) -> list[bytes]:
    parts, at = [], 0
    while at < len(answer):
        (size,) = struct.unpack_from("<Q", answer, at)
        parts.append(answer[at + 8 : at + 8 + size])
        at += 8 + size
    return parts


def _found(said: str) -> str:
    """The sanitizer's report as a finding: its headline and the lines of the kernel's frames."""
    headline = re.search(r"ERROR: AddressSanitizer: (.*)|runtime error: (.*)", said)
    what = (headline[1] or headline[2]) if headline else said[-500:]
    where = re.search(r"^(\S+:\d+:\d+): runtime error", said, re.MULTILINE)
    frames = re.findall(r"#\d+ 0x\w+ in (.+?) (/\S+:\d+)", said)
    lines = [f"{line.rpartition('/')[2]}" for _, line in frames if "/simt/" not in line]
    at = where[1].rpartition("/")[2] if where else lines[0] if lines else "an unknown line"
    return "\x1f".join([str(KINDS.index("sanitizer")), *"0000001", f"{what}, at {at}"]) + "\x1e"
