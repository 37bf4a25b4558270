"""Sweeps: one dimension of an op over many sizes, everything else as the op declares it.

`S=512:16384` doubles from 512 while it is at most 16384; `S=512,1000,3000` are sizes one by one;
both may be mixed with commas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigops.ops import Op

MOST = 64  # sizes of one sweep
LARGEST = 2**40


@dataclass(frozen=True)
class Sweep:
    """A dimension's name and its sizes, in the order in which they are measured."""

    name: str
    sizes: tuple[int, ...]


def parse(text: str) -> Sweep:
    """The sweep that `text` describes.

    Raises:
        ValueError: it describes none; the message does not repeat the text.
    """
    name, equals, listed = text.partition("=")
    if not name or not equals or not listed:
        raise ValueError("must be like S=512:16384 (doubling) or S=512,1000,3000")
    sizes: list[int] = []
    for word in listed.split(","):
        low, colon, high = word.partition(":")
        if not colon:
            sizes.append(_size(low))
            continue
        size, last = _size(low), _size(high)
        if last < size:
            raise ValueError(f"{word} must go upwards")
        while size <= last:
            sizes.append(size)
            size *= 2
    if len(sizes) > MOST:
        raise ValueError(f"must have at most {MOST} sizes, got {len(sizes)}")
    return Sweep(name, tuple(dict.fromkeys(sizes)))


def _size(word: str) -> int:
    if not (word.isascii() and word.isdigit()) or not 1 <= int(word) <= LARGEST:
        raise ValueError(f"{word or 'nothing'} is no size: it must be a whole number of at least 1")
    return int(word)


def missing(ops: Sequence[Op], sweep: Sweep, every: bool) -> str | None:
    """What the ops have instead of the sweep's dimension; None if one (or every) op has it."""
    lacking = [op for op in ops if sweep.name not in op.sweeps]
    if not lacking or (len(lacking) < len(ops) and not every):
        return None
    listed = "; ".join(f"{op.name} has {', '.join(op.sweeps) or 'none'}" for op in lacking)
    return f"no dimension {sweep.name!r}: {listed}"
