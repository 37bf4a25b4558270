"""The sections that are read: every case, call overhead, machine, peers, what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from bigops.bench.report import markup
from bigops.bench.report.common import CASE, run_command
from bigops.bench.report.markup import Cell, Row, Section, numeric, yes_or_no
from bigops.bench.tables import command, subject, truth

Json = Mapping[str, Any]

CASES = (
    ("op or model", "word"), ("case", "word"), ("dtype", "word"), ("pass", "word"), ("x eager", ""),
    ("spread", ""), ("x best", ""), ("best is", "word"), ("true", "word"), ("ours, ms", ""),
    ("eager, ms", ""),
    ("compiled, ms", ""), ("best, ms", ""), ("% of limit", ""), ("GFLOP/s", ""), ("GB/s", ""),
    ("in torch", ""), ("peak, MiB", ""), ("eager's peak", ""), ("error", ""),
    ("eager's error", ""), ("error's limit", ""), ("backend", "word"),
)  # fmt: skip
OVERHEAD = (
    ("op", "word"), ("sample", "word"), ("pass", "word"), ("ours, µs", ""), ("eager, µs", ""),
    ("overhead, µs", ""), ("spread", ""), ("limit", ""), ("within", "word"),
)  # fmt: skip


def cases(records: Sequence[Json], machine: Json) -> Section:
    """Everything that was measured, a row per record that opens to the command that repeats it."""
    rows = [
        Row(
            [
                Cell(subject(r)), Cell(r["case"]), Cell(r["dtype"]), Cell(r["pass"]),
                numeric(r["speedup_vs_eager"]), numeric(r["spread"]), numeric(r["speedup_vs_best"]),
                Cell(r["best_name"] or "–"), yes_or_no(truth(r)), numeric(r["time_ms"]),
                numeric(r["eager_ms"]), numeric(r["compile_ms"]), numeric(r["best_ms"]),
                numeric(r["percent_of_limit"]), numeric(r["gflops"]), numeric(r["gbytes"]),
                numeric(r["torch_share"]), numeric(r["peak_bytes"], 2**20),
                numeric(r["eager_peak_bytes"], 2**20), numeric(r["error"]),
                numeric(r["eager_error"]), numeric(r["error_limit"]), Cell(r["backend"]),
            ],
            [command(r, machine["threads"])],
        )
        for r in records
    ]  # fmt: skip
    if not rows:
        return Section("cases", "Every case", "")
    intro = "A head sorts by its column; a row opens to the command that repeats it."
    body = f'<p class="faint">{intro}</p>{markup.table("Every case", CASE, CASES, rows)}'
    return Section("cases", "Every case", body)


def overhead(rows: Sequence[Json], machine: Json) -> Section:
    """Microseconds of calls on next to nothing."""
    if not rows:
        return Section("overhead", "Call overhead", "")
    listed = [
        Row(
            [
                Cell(r["op"]), Cell(r["case"]), Cell(r["pass"]), numeric(r["ours_us"]),
                numeric(r["eager_us"]), numeric(r["overhead_us"]), numeric(r["spread_us"]),
                numeric(r["limit_us"]), yes_or_no(r["overhead_us"] <= r["limit_us"]),
            ]
        )
        for r in rows
    ]  # fmt: skip
    intro = (
        "Microseconds of a call that has next to nothing to compute, ours minus eager's. Below 0 "
        "ours returns sooner."
    )
    body = (
        f'<p class="faint">{intro}</p>'
        f"{markup.table('Call overhead', 'overhead-', OVERHEAD, listed)}"
        f"{markup.repeat([run_command(rows, machine)])}"
    )
    return Section("overhead", "Call overhead", body)


def machine(described: Json) -> Section:
    """What it was measured on, and what that can do at most."""
    facts = [(k, v) for k, v in _flat(described) if not k.startswith("ceilings")]
    rates = [(k, f"{v:.4g}") for k, v in (described.get("ceilings") or {}).items()]
    limits = f"<div><h3>Its ceilings in this run</h3>{markup.pairs(rates)}</div>" if rates else ""
    body = f'<div class="columns"><div>{markup.pairs(facts)}</div>{limits}</div>'
    return Section("machine", "The machine", body)


def _flat(described: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Its facts as words, those of a part after the part's name."""
    for key, value in described.items():
        name = prefix + key.replace("_", " ")
        if value is None:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} ")
        elif key == "memory_bytes":
            yield name.removesuffix(" bytes"), f"{value / 2**30:.1f} GiB"
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(map(str, value))
        else:
            yield name, value if isinstance(value, str) else json.dumps(value)


def peers(found: Json | Sequence[Json]) -> Section:
    """Which packages were looked for, and which were there."""
    if isinstance(found, Mapping):
        listed = [(name, str(state)) for name, state in found.items()]
    else:
        listed = [
            (p["name"], " – ".join(filter(None, (p.get("version"), p.get("reason")))))
            for p in found
        ]
    intro = "Other packages with kernels for these ops; those that are installed are contestants."
    body = f'<p class="faint">{intro}</p>{markup.pairs(listed)}' if listed else ""
    return Section("peers", "Peers", body)


def left_out(results: Json) -> Section:
    """What failed, and the run's notes."""
    failed = [f'<li class="bad">{escape(line)}</li>' for line in results["failed"]]
    notes = [f"<li>{escape(line)}</li>" for line in results["notes"]]
    items = "".join(failed + notes)
    body = f'<ul class="notes">{items}</ul>' if items else ""
    return Section("left-out", "Left out, and why", body)


def method() -> Section:
    """How the figures came to be."""
    return Section(
        "method",
        "How this was measured",
        "<p>Contestants alternate within each round; a speed-up is the median over the rounds of "
        "the baseline's time over ours in the same round, its spread the interquartile range of "
        "these ratios. Inputs are random and rotate, results are used, warm-up and compilation are "
        "not counted. Errors are against the op's float64 reference, relative to its size, for the "
        "tensor nearest its limit; the limit is twice eager's own error, at least 4 units in the "
        "last place. The limit of speed is the roofline of the ceilings above.</p>",
    )
