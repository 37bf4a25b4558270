"""What became slower or faster since an earlier run, beyond the noise.

Machines differ in load from run to run, so it is not times that are compared but speed-ups over
eager, whose two sides alternated within one run. A case became slower if its speed-up fell by more
than the interquartile ranges of both runs' ratios together, and by more than a twentieth; faster
the other way round. It became less true if its error is beyond its limit now and was not, or if it
takes more than half of its limit now and more than twice the share it took.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigops.bench.tables import number, subject, truth

Record = Mapping[str, Any]
Results = Mapping[str, Any]
Key = tuple[str, ...]

LEAST = 0.05  # a run's own spread does not show what differs from one process to the next

HEADERS = (
    "op or model", "case", "pass", "dtype", "was, x eager", "is, x eager", "noise", "change",
)  # fmt: skip


def key(record: Record) -> Key:
    """What two records of one case have in common."""
    return (subject(record), record["case"], record["pass"], record["device"], record["dtype"])


@dataclass(frozen=True)
class Change:
    """One case, then and now."""

    old: Record
    new: Record

    @property
    def noise(self) -> float:
        """Both interquartile ranges of the speed-up over eager, or a twentieth of what it was."""
        old = self.old
        return max(old["spread"] + self.new["spread"], LEAST * old["speedup_vs_eager"])

    @property
    def gain(self) -> float:
        """By how much the speed-up over eager grew."""
        return float(self.new["speedup_vs_eager"] - self.old["speedup_vs_eager"])

    @property
    def slower(self) -> bool:
        return self.gain < -self.noise

    @property
    def faster(self) -> bool:
        return self.gain > self.noise

    @property
    def less_true(self) -> bool:
        then, now = _share(self.old), _share(self.new)
        if then is None or now is None:
            return False
        if not now <= 1.0:  # or not a number
            return then <= 1.0
        return now > max(0.5, 2.0 * then)

    @property
    def regression(self) -> bool:
        return self.slower or self.less_true

    @property
    def words(self) -> str:
        """What happened, for a table."""
        ratio = self.new["speedup_vs_eager"] / self.old["speedup_vs_eager"]
        said = [f"{'SLOWER' if self.slower else 'faster'}, {ratio:.2f}x"]
        if not (self.slower or self.faster):
            said = []
        if self.less_true:
            said.append(
                f"LESS TRUE: {_share(self.old):.2f} of its limit, now {_share(self.new):.2f}"
            )
        if self.old["backend"] != self.new["backend"]:
            said.append(f"by {self.new['backend']}, was {self.old['backend']}")
        return "; ".join(said)


@dataclass(frozen=True)
class Comparison:
    """All cases of two runs: those in both, and the keys of those in one only."""

    changes: list[Change]
    added: list[Key]
    missing: list[Key]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]

    def rows(self) -> list[list[str]]:
        """One row per case that changed, under `HEADERS`."""
        return [
            [
                subject(c.new), c.new["case"], c.new["pass"], c.new["dtype"],
                f"{c.old['speedup_vs_eager']:.2f}", f"{c.new['speedup_vs_eager']:.2f}",
                number(c.noise), c.words,
            ]
            for c in self.changes
            if c.words
        ]  # fmt: skip

    def summary(self) -> str:
        """One line."""
        slower, faster, less_true = (
            sum(getattr(change, what) for change in self.changes)
            for what in ("slower", "faster", "less_true")
        )
        still = sum(not change.words for change in self.changes)
        return (
            f"{slower} slower, {faster} faster, {less_true} less true, {still} within the noise, "
            f"{len(self.added)} new, {len(self.missing)} missing"
        )


def compare(
    old: Sequence[Record],
    new: Sequence[Record],
    asked: Callable[[Record], bool] = lambda record: True,
) -> Comparison:
    """The records of two runs side by side; an old one that was not `asked` for is not missed."""
    then = {key(record): record for record in old}
    now = {key(record): record for record in new}
    return Comparison(
        [Change(then[k], now[k]) for k in now if k in then],
        [k for k in now if k not in then],
        [k for k, record in then.items() if k not in now and asked(record)],
    )


def load(path: str) -> dict[str, Any]:
    """The results that `bigops bench --json` wrote.

    Raises:
        ValueError: one line that says why they cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    try:
        for record in found["records"]:
            Change(record, record).words  # noqa: B018  every field that a comparison reads
            key(record)
        _machine(found)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no file of bigops bench --json (no {error})") from error
    return dict(found)


def unlike(old: Results, new: Results) -> str | None:
    """Why the two runs cannot be compared; None if they can."""
    then, now = _machine(old), _machine(new)
    told = [f"{name} {then[name]}, not {now[name]}" for name in now if then[name] != now[name]]
    return f"it was measured on {'; '.join(told)}" if told else None


def newer(old: Results, new: Results) -> list[str]:
    """What else may have changed a figure: versions, the instruction set, other work."""
    then, now = old["machine"], new["machine"]
    told = [
        f"{name} was {then.get(name)}, is {now.get(name)}"
        for name in ("bigops", "torch", "triton", "isa")
        if then.get(name) != now.get(name)
    ]
    for which, machine in (("the earlier run", then), ("this run", now)):
        # Load hits the two sides of a ratio unlike, and no spread within a run shows it.
        if machine.get("load", 0.0) > machine.get("cores", 1) / 2:
            told.append(f"other work went on beside {which}: load {machine['load']:g}")
    return told


def _machine(results: Results) -> dict[str, Any]:
    machine = results["machine"]
    device = machine["device"].partition(":")[0]
    if device == "cpu":
        return {"device": device, "processor": machine["cpu"], "threads": machine["threads"]}
    return {"device": device, "gpu": machine["gpu"]["name"]}


def _share(record: Record) -> float | None:
    """The part of its limit that the error takes."""
    judged = truth(record)
    if judged is None:
        return None
    limit = record["error_limit"]
    return float(record["error"] / limit) if limit else float(not judged)
