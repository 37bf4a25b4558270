"""What changed between a saved ledger and this one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .entries import Entry, Name, entry, read
from .rules import RANK

SHOWN = (
    "registers",
    "agpr",
    "sgpr",
    "spills",
    "shared",
    "tensor_memory",
    "matrix",
    "load",
    "store",
)


@dataclass(frozen=True)
class Change:
    """What changed of one entry, in words, and in how far it is worse."""

    name: Name
    words: list[str]
    worse: list[str]


def saved(text: str) -> list[Entry]:
    """The entries of a file of the ledger, or of what --json wrote.

    Raises:
        ValueError: it is neither.
    """
    if not text.lstrip().startswith("{"):
        return read(text)[1]
    try:
        return [entry(words) for words in json.loads(text)["entries"]]
    except (KeyError, TypeError) as error:
        raise ValueError("not what --json writes") from error


def changes(before: Sequence[Entry], after: Sequence[Entry]) -> list[Change]:
    """The changed entries, in the order of `after`; then those that are gone."""
    old, new = {e.name: e for e in before}, {e.name: e for e in after}
    found = []
    for name, now in new.items():
        if name not in old:
            found.append(Change(name, ["new"], []))
        elif words := _words(old[name], now):
            found.append(Change(name, words, _worse(old[name], now)))
    return found + [Change(name, ["gone"], []) for name in old if name not in new]


def _words(old: Entry, new: Entry) -> list[str]:
    words = [
        f"{name} {getattr(old, name) or 0} -> {getattr(new, name) or 0}"
        for name in SHOWN
        if getattr(old, name) != getattr(new, name)
    ]
    if old.tf32 != new.tf32:
        words.append("TF32 appears" if new.tf32 else "TF32 is gone")
    if old.occupancy.percent != new.occupancy.percent:
        words.append(f"occupancy {old.occupancy.percent}% -> {new.occupancy.percent}%")
    before, after = (dict(w.split("=") for w in e.config.split()) for e in (old, new))
    words += [
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    return words


def _worse(old: Entry, new: Entry) -> list[str]:
    found = []
    if new.spills > old.spills:
        found.append("spills")
    if _rank(new) < _rank(old):
        found.append("lost a matrix instruction")
    if new.occupancy.percent < old.occupancy.percent:
        found.append("lower occupancy")
    return found


def _rank(entry: Entry) -> int:
    """How good its best matrix instruction is."""
    kinds = entry.matrix_counts
    return max((RANK.index(kind) if kind in RANK else 1 for kind in kinds), default=0)
