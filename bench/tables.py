"""The table of a run, as rows for the terminal and as Markdown for README."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEADERS = (
    "op or model", "case", "pass", "dtype", "ours, ms", "eager, ms", "best PyTorch", "x eager",
    "x best", "% of limit", "error / limit",
)  # fmt: skip


def subject(record: Record) -> str:
    """The op's or the model's name."""
    return str(record.get("op") or record["model"])


def truth(record: Record) -> bool | None:
    """Whether the error is within its limit; None where it was not measured."""
    if record["error"] is None:
        return None
    return bool(record["error"] <= record["error_limit"])


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row of words per record, under `HEADERS`."""
    return [
        [
            subject(r), r["case"], r["pass"], r["dtype"], number(r["time_ms"]),
            number(r["eager_ms"]), f"{r['best_name']} {number(r['best_ms'])}",
            f"{r['speedup_vs_eager']:.2f} ± {r['spread'] / 2:.2f}", f"{r['speedup_vs_best']:.2f}",
            number(r["percent_of_limit"]), _of_limit(r),
        ]
        for r in records
    ]  # fmt: skip


def overhead_rows(measured: Sequence[Record]) -> list[list[str]]:
    """One row per op and pass: microseconds of ours, of eager, between them, and the limit."""
    keys = ("ours_us", "eager_us", "overhead_us", "limit_us")
    return [[r["op"], r["case"], r["pass"], *(f"{r[key]:.1f}" for key in keys)] for r in measured]


OVERHEAD_HEADERS = ("op", "sample", "pass", "ours, µs", "eager, µs", "overhead, µs", "limit, µs")


def markdown(results: Record) -> str:
    """README's table with what it was measured on, between its markers."""
    machine = results["machine"]
    lines = [
        BEGIN,
        f"Measured by `bigops bench` on {machine['cpu']}, {machine['threads']} threads "
        f"({machine['isa']}), PyTorch {machine['torch']}. Best PyTorch is the fastest of eager, "
        "torch.compile and torch's other ways to make the same call; ± is half the interquartile "
        "range.",
        "",
        *_markdown_table(HEADERS, rows(results["records"]), 4),
    ]
    if results["overhead"]:
        lines += ["", "Call overhead on tiny inputs, ours minus eager:", ""]
        lines += _markdown_table(OVERHEAD_HEADERS, overhead_rows(results["overhead"]), 3)
    training = results["training"]
    if training:
        ours, plain = training["evaluations"][-1], training["plain_evaluations"][-1]
        lines += [
            "",
            f"CNN on handwritten digits, {len(training['evaluations'])} epochs from one seed: "
            f"held-out accuracy {100 * ours['accuracy']:.2f}%, plain twin "
            f"{100 * plain['accuracy']:.2f}%; {training['speedup']:.2f}x as fast per step.",
        ]
    return "\n".join([*lines, END])


def insert(text: str, table: str) -> str:
    """`text` with what is between its markers, markers included, replaced by `table`.

    Raises:
        ValueError: the markers are not there, once each and in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"it must have the lines {BEGIN} and {END}, once each, in this order")
    before, _, rest = text.partition(BEGIN)
    return before + table + rest.partition(END)[2]


def command(record: Record, threads: int) -> str:
    """The command that repeats a record's figure."""
    words = ["bigops", "bench", subject(record)]
    if swept := record["sweep"]:
        words += ["--sweep", f"{swept['name']}={swept['value']}"]
    else:
        words += ["--case", record["case"].removesuffix(" (CUDA graph)")]
    words += ["--dtype", record["dtype"], *record["options"].split()]
    device = record["device"]
    words += ["--threads", str(threads)] if device == "cpu" else ["--device", device]
    return shlex.join(words)


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value is None:
        return "–"
    if value == 0.0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.1e}"


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _of_limit(record: Record) -> str:
    if record["error"] is None:
        return "–"
    limit = record["error_limit"]
    share = record["error"] / limit if limit else float(record["error"] > 0.0)
    return f"{share:.2f}" + ("" if truth(record) else " BEYOND")


def _markdown_table(headers: Sequence[str], body: Sequence[Sequence[str]], words: int) -> list[str]:
    align = ["---"] * words + ["---:"] * (len(headers) - words)
    lines = [headers, align, *([cell.replace("|", "\\|") for cell in row] for row in body)]
    return ["| " + " | ".join(line) + " |" for line in lines]
