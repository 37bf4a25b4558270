"""The ledger's files against the kernels as they are now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ops import Op, table
from .compiling import compile_all, plan
from .entries import Entry, recorded, written
from .launches import Launch


@dataclass(frozen=True)
class Comparison:
    """The launches of some ops, and of each the recorded entry if nothing it depends on changed."""

    launches: list[Launch]
    known: list[Entry | None]

    @property
    def changed(self) -> list[Launch]:
        pairs = zip(self.launches, self.known, strict=True)
        return [launch for launch, entry in pairs if entry is None]

    def entries(self, compiled: Sequence[Entry]) -> list[Entry]:
        """All entries, those of `changed` having been compiled."""
        rest = iter(compiled)
        return [entry or next(rest) for entry in self.known]


def own_ops() -> list[Op]:
    """The ops whose kernels have files in the ledger: those that bigops itself declares."""
    return [op for op in table().values() if op.function.__module__.startswith("bigops.")]


def compare(launches: Sequence[Launch], version: str | None) -> Comparison:
    """Launches against the files, which count only if this version of Triton wrote them."""
    entries = {
        (e.name, e.key): e
        for written_by, found in recorded().values()
        for e in found
        if version in (None, written_by)
    }
    known = [entries.get((_name(launch), launch.key)) for launch in launches]
    return Comparison(list(launches), known)


def _name(launch: Launch) -> tuple[str, str, str, str, str, str]:
    return launch.kernel, launch.op, launch.call, launch.dtype, launch.step, launch.target


def renewed(
    version: str, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, str], int, int]:
    """The files as they should be, by name, compiling what changed; how many entries, how many new.

    Interrupted, what was compiled stays in Triton's own cache.
    """
    comparison = compare(plan(own_ops()), version)
    total, done = len(comparison.changed), 0

    def report(launch: Launch) -> None:
        nonlocal done
        done += 1
        progress(f"{launch.kernel} on {launch.target}", done, total)

    entries = comparison.entries(compile_all(comparison.changed, report))
    by_file: dict[str, list[Entry]] = {}
    for launch, entry in zip(comparison.launches, entries, strict=True):
        by_file.setdefault(launch.module.rpartition(".")[2], []).append(entry)
    texts = {name: written(f"{name}.py", version, found) for name, found in by_file.items()}
    return texts, len(entries), total
