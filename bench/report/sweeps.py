"""Records that differ in one size only, brought together as lines over it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigops.bench.report.markup import known, short
from bigops.bench.tables import subject

Record = Mapping[str, Any]
OURS = "bigops"


@dataclass(frozen=True)
class Sweep:
    """One call at several sizes: `records` by rising size of the dimension `name`."""

    subject: str
    case: str  # with the dimension's name in place of its size
    name: str
    records: Sequence[Record]

    @property
    def title(self) -> str:
        """What all its records are."""
        first = self.records[0]
        return f"{self.subject}, {self.case}, {short(first['dtype'])}, {first['pass']}"

    def times(self) -> dict[str, list[tuple[float, float]]]:
        """Every contestant's milliseconds over size, ours first."""
        return self._over_size(milliseconds)

    def rates(self, key: str) -> dict[str, list[tuple[float, float]]]:
        """Every contestant's `gflops` or `gbytes` over size: ours, scaled by the times."""
        return self._over_size(
            lambda r: {
                name: r[key] * r["time_ms"] / ms if known(r[key]) and known(ms) else None
                for name, ms in milliseconds(r).items()
            }
        )

    def peaks(self) -> dict[str, list[tuple[float, float]]]:
        """Peak MiB over size, ours and eager's."""
        return self._over_size(
            lambda r: {
                name: r[key] / 2**20 if known(r[key]) else None
                for name, key in ((OURS, "peak_bytes"), ("eager", "eager_peak_bytes"))
            }
        )

    def _over_size(
        self, values: Callable[[Record], Mapping[str, float | None]]
    ) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for record in self.records:
            for name, value in values(record).items():
                if known(value):
                    found.setdefault(name, []).append((record["sweep"]["value"], value))
        return found


def milliseconds(record: Record) -> dict[str, float | None]:
    """Every contestant's time, ours first; of old records those that they name."""
    old = {
        "eager": record["eager_ms"],
        "compile": record["compile_ms"],
        record["best_name"]: record["best_ms"],
    }
    return {OURS: record["time_ms"]} | (record["peers_ms"] or old)


def sweeps(records: Sequence[Record]) -> list[Sweep]:
    """The sweeps among the records, in their order.

    Records belong together whose cases differ in numbers only; a size that comes again begins
    another sweep.
    """
    families: dict[tuple[Any, ...], dict[int, Record]] = {}
    for r in records:
        if r["sweep"]:
            words = re.sub(r"\d+", "0", r["case"])
            key = (subject(r), r["dtype"], r["pass"], r["device"], r["sweep"]["name"], words)
            again = 0
            while r["sweep"]["value"] in families.setdefault((*key, again), {}):
                again += 1
            families[*key, again][r["sweep"]["value"]] = r
    found = []
    for key, members in families.items():
        in_order = [members[size] for size in sorted(members)]
        found.append(Sweep(key[0], _common_case(key[4], in_order), key[4], in_order))
    return found


def _common_case(name: str, records: Sequence[Record]) -> str:
    """The records' case, with the dimension's name where all have its size, and * where they differ
    otherwise."""
    sizes = tuple(str(r["sweep"]["value"]) for r in records)
    numbers = zip(*(re.findall(r"\d+", r["case"]) for r in records), strict=True)
    shown = [
        name if column == sizes else column[0] if len(set(column)) == 1 else "*"
        for column in numbers
    ]
    words = re.split(r"\d+", records[0]["case"])
    return "".join(a + b for a, b in zip(words, [*shown, ""], strict=True))
