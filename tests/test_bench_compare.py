"""Comparing two runs: what is noise, what is not, and that a suspect is measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigops.bench import compare, machine, run
from bigops.bench.compare import Change
from bigops.cli import main


def record(case: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "op": "toy",
        "case": case,
        "pass": "forward",
        "device": "cpu",
        "dtype": "float32",
        "backend": "native",
        "speedup_vs_eager": 2.0,
        "spread": 0.1,
        "error": 1e-7,
        "error_limit": 1e-6,
        "sweep": None,
        "options": "",
    } | changes


def results(*records: dict[str, Any], **machine: Any) -> dict[str, Any]:
    where = {"cpu": "x", "device": "cpu", "threads": 2, "isa": "v4", "torch": "2.13.0"}
    return {"machine": where | machine, "records": list(records)}


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        ({}, {}, ""),
        ({}, {"speedup_vs_eager": 1.81}, ""),  # within both ranges together
        ({}, {"speedup_vs_eager": 1.79}, "slower"),
        ({}, {"speedup_vs_eager": 2.19}, ""),
        ({}, {"speedup_vs_eager": 2.21}, "faster"),
        ({"spread": 0.0}, {"spread": 0.0, "speedup_vs_eager": 1.91}, ""),  # within a twentieth
        ({"spread": 0.0}, {"spread": 0.0, "speedup_vs_eager": 1.89}, "slower"),
        ({"spread": 0.0}, {"spread": 1.0, "speedup_vs_eager": 1.1}, ""),  # noisy now
        ({"spread": 1.0}, {"spread": 0.0, "speedup_vs_eager": 1.1}, ""),  # noisy then
        ({}, {"error": 4e-7}, ""),
        ({}, {"error": 6e-7}, "less true"),
        ({"error": 4e-7}, {"error": 7e-7}, ""),  # not twice as much
        ({"error": 8e-7}, {"error": 1.1e-6}, "less true"),
        ({"error": 1.1e-6}, {"error": 1.2e-6}, ""),  # it was beyond its limit before
        ({}, {"error": float("nan")}, "less true"),
        ({"error": None, "error_limit": None}, {"error": 2e-6}, ""),
        ({"error": 0.0, "error_limit": 0.0}, {"error": 0.0, "error_limit": 0.0}, ""),
        ({"error": 0.0, "error_limit": 0.0}, {"error": 1e-9, "error_limit": 0.0}, "less true"),
    ],
)
def test_verdicts(then: dict[str, Any], now: dict[str, Any], verdict: str) -> None:
    change = Change(record(**then), record(**now))
    found = {"slower": change.slower, "faster": change.faster, "less true": change.less_true}
    assert [name for name, told in found.items() if told] == ([verdict] if verdict else [])
    assert change.regression == (verdict in ("slower", "less true"))
    assert bool(change.words) == bool(verdict)


positive = st.floats(0.01, 100.0)
records = st.builds(
    record,
    case=st.text(min_size=1),
    speedup_vs_eager=positive,
    spread=st.floats(0.0, 10.0),
    error=st.none() | st.floats(0.0, 1.0),
    error_limit=positive,
)


@given(st.lists(records, unique_by=lambda r: r["case"]))
def test_a_run_compared_with_itself_has_no_changes(same: list[dict[str, Any]]) -> None:
    found = compare.compare(same, same)
    assert len(found.changes) == len(same)
    assert [found.regressions, found.rows(), found.added, found.missing] == [[], [], [], []]


@given(records, records)
def test_one_side_is_slower_where_the_other_is_faster(a: Any, b: Any) -> None:
    there, back = Change(a, b), Change(b, a)
    assert not (there.slower and there.faster)
    if there.slower and there.noise == back.noise:
        assert back.faster


def test_a_change_of_backend_is_said() -> None:
    assert Change(record(), record(backend="reference")).words == "by reference, was native"


def test_cases_of_one_run_only_are_listed() -> None:
    old = [record("a"), record("b"), record("c", op="gone")]
    new = [record("a"), record("d")]
    found = compare.compare(old, new)
    assert [k[1] for k in found.added] == ["d"]
    assert [k[:2] for k in found.missing] == [("toy", "b"), ("gone", "c")]
    found = compare.compare(old, new, lambda r: r["op"] == "toy")
    assert [k[1] for k in found.missing] == ["b"]
    assert (
        found.summary() == "0 slower, 0 faster, 0 less true, 1 within the noise, 1 new, 1 missing"
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"torch": "2.14.0", "isa": "v3"}, None),
        ({"cpu": "y"}, "processor x, not y"),
        ({"threads": 1}, "threads 2, not 1"),
        ({"device": "cuda:0", "gpu": {"name": "H100"}}, "gpu"),
    ],
)
def test_other_machines_are_refused(changed: dict[str, Any], reason: str | None) -> None:
    old, new = results(), results(**changed)
    if reason == "gpu":
        with pytest.raises(KeyError):
            compare.unlike(old, new)
        return
    found = compare.unlike(old, new)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def test_newer_versions_are_said() -> None:
    assert compare.newer(results(), results(torch="2.14.0")) == ["torch was 2.13.0, is 2.14.0"]


def test_load_is_said() -> None:
    busy, quiet = results(load=1.1, cores=2), results(load=1.0, cores=2)
    assert compare.newer(quiet, quiet) == []
    assert compare.newer(busy, quiet) == ["other work went on beside the earlier run: load 1.1"]
    assert compare.newer(quiet, busy) == ["other work went on beside this run: load 1.1"]
    assert machine.describe()["load"] >= 0.0


def written(name: str, content: Any) -> str:
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_two_files(capsys: pytest.CaptureFixture[str]) -> None:
    old = written("old.json", results(record("a"), record("b"), record("gone")))
    same = ("bench", "--compare", old, "--with")
    assert main([*same, old]) == 0
    assert "0 slower, 0 faster, 0 less true, 3 within the noise" in capsys.readouterr().out
    new = results(record("a", speedup_vs_eager=1.0), record("b", speedup_vs_eager=3.0), torch="9")
    assert main([*same, written("new.json", new)]) == 1
    out = capsys.readouterr().out
    assert "SLOWER, 0.50x" in out
    assert "faster, 1.50x" in out
    assert "missing: toy gone forward float32" in out
    assert "note: torch was 2.13.0, is 9" in out
    assert "since old.json: 1 slower, 1 faster, 0 less true, 0 within the noise" in out
    assert {path.name for path in Path().iterdir()} == {"old.json", "new.json"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "old.json: No such file"),
        ("{", "old.json is no JSON: "),
        ([], "old.json is no file of bigops bench --json"),
        ({"records": [{"op": "toy"}]}, "old.json is no file of bigops bench --json (no "),
        ({"records": []}, "old.json is no file of bigops bench --json (no 'machine')"),
        (results(cpu="another"), "old.json: it was measured on processor another, not "),
    ],
)
def test_bad_files(content: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        written("old.json", content)
    assert main(["bench", "--compare", "old.json"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bigops bench: --compare: {message}")
    assert err.count("\n") == 1


def test_with_needs_an_older_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--with", "x.json"]) == 2
    assert "--with needs --compare OLD.json" in capsys.readouterr().err
    assert main(["bench", "adam", "--compare", "x.json", "--with", "x.json"]) == 2
    assert "--with compares whole files, not adam" in capsys.readouterr().err


LIVE = ("bench", "attention", "--quick", "--case", "1x8x2048x64", "--dtype", "fp32", "--report", "")
CASE = "1x8x2048x64"


def live(
    monkeypatch: pytest.MonkeyPatch, speedups: list[float], *words: str
) -> tuple[int, list[float]]:
    """`bench --compare` of a run that finds these speed-ups in turn; the seconds it was given."""
    seconds: list[float] = []

    def measured(case: Any, ceilings: Any, effort: Any) -> list[dict[str, Any]]:
        seconds.append(effort.seconds)
        rest = ("time_ms", "eager_ms", "best_ms", "best_name", "percent_of_limit")
        found = record(case.name, op=case.subject, speedup_vs_eager=speedups[len(seconds) - 1])
        return [found | dict.fromkeys(rest) | {"speedup_vs_best": 1.0}]

    monkeypatch.setattr(run, "measure", measured)
    here = machine.describe("cpu")
    old = {"machine": here, "records": [record(CASE, op="attention")]}
    status = main([*LIVE, "--compare", written("old.json", old), "--json", "new.json", *words])
    return status, seconds


def test_a_suspect_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, seconds = live(monkeypatch, [1.0, 2.0])
    assert status == 0
    assert seconds == [0.8, 1.6]
    assert "0 slower, 0 faster, 0 less true, 1 within" in capsys.readouterr().out
    saved = json.loads(Path("new.json").read_text())["records"]
    assert [r["speedup_vs_eager"] for r in saved] == [2.0]


def test_slower_twice_is_a_regression(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, seconds = live(monkeypatch, [1.0, 1.1])
    assert status == 1
    assert len(seconds) == 2
    assert "SLOWER, 0.55x" in capsys.readouterr().out


def test_what_is_no_suspect_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live(monkeypatch, [3.0]) == (0, [0.8])


def test_other_threads_are_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        status, seconds = live(monkeypatch, [], "--threads", str(threads + 1))
    finally:
        torch.set_num_threads(threads)
    assert (status, seconds) == (2, [])
    assert f"threads {threads}, not {threads + 1}" in capsys.readouterr().err
    assert not Path("new.json").exists()


def test_only_what_the_run_asks_for_is_missed() -> None:
    def asked(**changes: Any) -> list[bool]:
        plan = run.quick(ops=("attention",), models=(), dtypes=(torch.float32,), **changes)
        told = run.asked(plan)
        olds = (
            record(op="attention"),
            record(op="adam"),
            record(op="attention", dtype="bfloat16"),
            record(op="attention", sweep={"name": "S", "value": 4}),
        )
        return [bool(told(old)) for old in olds]

    assert asked() == [True, False, False, False]
    assert asked(case="2048") == [False] * 4
