"""Reading what the steps of a GPU run left behind: key figures, and one record of all benchmarks.

Every reader takes what may be missing, cut off or damaged and says so in a line.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .gpu_steps import Reading, last_line

Json = dict[str, Any]
# What `bigops bench --json` writes, and of which kind.
RESULTS: Mapping[str, type] = {"machine": dict, "records": list}


class Damaged(ValueError):
    """A file is missing, cut off or not what it should be."""


def load(path: Path, keys: Mapping[str, type]) -> Json:
    """A JSON object that has these keys with values of these kinds."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error
    except ValueError as error:
        raise Damaged(f"{path.name} is not JSON: {error}") from error
    for key, kind in keys.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise Damaged(f"{path.name} has no {kind.__name__} {key!r}")
    return found


def read_pytest(path: Path, log: str) -> Reading:
    """Counts out of pytest's junit file, or else out of what `pytest -v` has printed by then."""
    try:
        suites = ET.parse(path).getroot()
        suite = suites if suites.tag == "testsuite" else next(suites.iter("testsuite"))
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        failed = counts["failures"] + counts["errors"]
        passed = counts["tests"] - failed - counts["skipped"]
        skipped = counts["skipped"]
        bad = [
            str(case.get("name"))
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    except (OSError, ET.ParseError, StopIteration, ValueError):
        words = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE)
        passed, skipped = words.count("PASSED"), words.count("SKIPPED")
        failed = words.count("FAILED") + words.count("ERROR")
        bad = re.findall(r"::(.*) (?:FAILED|ERROR)\b", log)
    figure = f"{passed} passed, {failed} failed, {skipped} skipped"
    if failed:
        return Reading(figure, f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}")
    if not passed:
        return Reading(figure, f"no test ran: {last_line(log)}")
    return Reading(figure)


def read_check(path: Path, log: str) -> Reading:
    """Samples that failed, and the worst error over its limit, out of `bigops check --json`."""
    try:
        found = load(path, {"checks": list, "failures": list})
    except Damaged as error:
        return Reading("", f"{error}: {last_line(log)}")
    checks, failures = found["checks"], found["failures"]
    samples = {_sample(entry) for entry in (*checks, *failures)}
    bad = {_sample(entry) for entry in failures}
    figure = f"{len(bad)} of {len(samples)} samples failed"
    judged = [entry for entry in checks if entry["error_limit"] > 0.0]
    if judged:
        worst = max(judged, key=_share)
        place = f"{' '.join(_sample(worst))} {worst['tensor']}"
        figure += f", worst {_share(worst):.2f} of its limit ({place})"
    if bad:
        return Reading(figure, f"first: {' '.join(_sample(failures[0]))}")
    return Reading(figure, None if samples else "no sample was served")


def _sample(entry: Json) -> tuple[str, ...]:
    return tuple(str(entry[key]) for key in ("op", "backend", "dtype", "case"))


def _share(entry: Json) -> float:
    return float(entry["error"] / entry["error_limit"])


def read_sanitizer(log: str) -> Reading:
    """Errors or hazards as compute-sanitizer's tools sum them up."""
    if refused := re.search(r"Device not supported|not supported on (?:this|the) device", log):
        return Reading("", skip=f"compute-sanitizer refuses this machine: {refused[0]}")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    if not summaries:
        return Reading("", f"no summary: {last_line(log)}")
    errors = sum(int(n) for text in summaries for n in re.findall(r"(\d+) (?:error|hazard)", text))
    calls = re.findall(r"^(\d+ calls.*)$", log, re.MULTILINE)
    figure = "; ".join([*summaries[-1:], *calls[-1:]])
    return Reading(figure, "see the log" if errors else None)


def read_calls(log: str) -> Reading:
    """The last line of `bigops.bench.exercise`."""
    lines = re.findall(r"^(\d+ calls.*)$", log, re.MULTILINE)
    return Reading(lines[-1] if lines else "")


def read_rates(program: str, log: str) -> Reading:
    """The first case of `bigops.bench.attention_rates` or `adam_rates`; or why it measures none."""
    if refused := re.search(rf"^{program}: (.*)$", log, re.MULTILINE):
        return Reading("", skip=refused[1])
    lines = re.findall(r"^(?!\$)\S.*  .*\d$", log, re.MULTILINE)
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    return Reading(lines[0] + more if lines else "", None if lines else f"none: {last_line(log)}")


def read_bench(path: Path, log: str) -> Reading:
    """Speed against eager, the fastest case, and what is beyond its error limit."""
    try:
        found = load(path, RESULTS)
        records = found["records"]
        speedups = [float(r["speedup_vs_eager"]) for r in records]
        beyond = [r for r in records if _beyond(r)]
        mean = math.exp(sum(map(math.log, speedups)) / len(speedups)) if records else 0.0
        fastest = max(records, key=lambda r: float(r["speedup_vs_eager"]), default=None)
    except Damaged as error:
        return Reading("", f"{error}: {last_line(log)}")
    except (KeyError, TypeError, ValueError) as error:
        return Reading("", f"{path.name} has a damaged record: {type(error).__name__} {error}")
    if fastest is None:
        return Reading("no case was measured", "; ".join(found.get("failed", []))[:200] or "why?")
    figure = f"{len(records)} cases, {mean:.2f}x eager"
    figure += f", best {max(speedups):.2f}x ({fastest['case']} {fastest['dtype']})"
    problems = [f"{r['case']} {r['dtype']} is beyond its error limit" for r in beyond]
    problems += [str(text) for text in found.get("failed", [])]
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return Reading(figure, problems[0][:200] + more if problems else None)


def _beyond(record: Json) -> bool:
    return record["error"] is not None and not record["error"] <= record["error_limit"]


def merge(paths: Iterable[Path]) -> tuple[Json, list[str]]:
    """One result out of several `bigops bench --json` files, and why some were left out.

    Lists are joined and dictionaries united, among them the ceilings, which each run measures for
    the sizes that it needs; of anything else the first that there is counts.
    """
    merged: Json = {
        "machine": {},
        "records": [],
        "overhead": [],
        "training": None,
        "notes": [],
        "failed": [],
    }
    damaged = []
    for path in paths:
        try:
            found = load(path, RESULTS)
        except Damaged as error:
            damaged.append(str(error))
            continue
        ceilings = merged["machine"].get("ceilings", {}) | found["machine"].get("ceilings", {})
        for key, value in found.items():
            known = merged.get(key)
            if isinstance(known, list) and isinstance(value, list):
                known += [item for item in value if item not in known]
            elif isinstance(known, dict) and isinstance(value, dict):
                merged[key] = value | known
            elif known is None:
                merged[key] = value
        merged["machine"]["ceilings"] = ceilings
    return merged, damaged
