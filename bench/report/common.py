"""What the sections share: how a record is named, what repeats it, a figure per op."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from bigops.bench.report import markup
from bigops.bench.report.markup import known, short
from bigops.bench.tables import number, subject

Json = Mapping[str, Any]
Record = Mapping[str, Any]

CASE = "case-"  # and a record's index: the id of its row in the table of every case
UNITS = {"gflops": "GFLOP/s", "gbytes": "GB/s"}


def title(record: Record) -> str:
    """Op, case and dtype."""
    return f"{subject(record)}, {record['case']}, {short(record['dtype'])}"


def rate(record: Record, *keys: str) -> str:
    """The rates of these keys, and how near the machine's limit they are."""
    words = [f"{number(record[key])} {UNITS[key]}" for key in keys]
    if known(record["percent_of_limit"]):
        words.append(f"{number(record['percent_of_limit'])}% of limit")
    return ", ".join(words)


def run_command(records: Sequence[Record], machine: Json, *options: str) -> str:
    """The command that measures all cases of the records' ops and models."""
    names = list(dict.fromkeys(subject(r) for r in records))
    measured_so = records[0].get("options", "").split()
    on_cpu = machine["device"] == "cpu"
    where = ["--threads", str(machine["threads"])] if on_cpu else ["--device", machine["device"]]
    return shlex.join(["bigops", "bench", *names, *measured_so, *options, *where])


def by_subject(
    records: Sequence[Record],
    picture: Callable[[str, Sequence[Record]], str],
    machine: Json,
    *options: str,
) -> str:
    """A figure per op or model; `picture` draws one from its name and records."""
    figures = []
    for name in dict.fromkeys(subject(r) for r in records):
        found = [r for r in records if subject(r) == name]
        repeat = [run_command(found, machine, *options)]
        figures.append(markup.figure(name, picture(name, found), repeat))
    return f'<div class="masonry">{"".join(figures)}</div>' if figures else ""


def introduced(intro: str, body: str) -> str:
    """The body after a sentence about it; nothing if it is empty."""
    return f'<p class="faint">{escape(intro)}</p>{body}' if body else ""
