"""bench/gpu_run.sh without a GPU: what it reads of the machine and of its steps' files, and what
`bigops bench` does on a GPU only.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bigops.bench import gpu_machine, gpu_results, records
from bigops.bench.gpu_steps import Reading

# ---- readers


def test_nvidia_smi() -> None:
    fields = ("name", "clocks.sm", "mig.mode.current", "power.draw")
    text = "NVIDIA H100 80GB HBM3, 1980 MHz, [N/A], 71.20 W\nNVIDIA L4, N/A, Disabled, 9 W\n"
    assert gpu_machine.parse_smi(text, fields) == [
        {
            "name": "NVIDIA H100 80GB HBM3",
            "clocks.sm": "1980 MHz",
            "mig.mode.current": None,
            "power.draw": "71.20 W",
        },
        {
            "name": "NVIDIA L4",
            "clocks.sm": None,
            "mig.mode.current": "Disabled",
            "power.draw": "9 W",
        },
    ]
    assert gpu_machine.parse_smi("", fields) == []
    with pytest.raises(ValueError, match="gave 1 values, not 4"):
        gpu_machine.parse_smi("No devices were found", fields)


def test_a_missing_nvidia_smi_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert str(gpu_machine.gpus()).startswith("nvidia-smi: ")
    assert gpu_machine.describe()["c++"] is None


def test_nvcc_version() -> None:
    text = "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler\n"
    assert gpu_machine.parse_nvcc(text) == "13.0.88"
    assert gpu_machine.parse_nvcc("nothing") is None


JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="1" failures="1"
skipped="2" tests="10" time="3.2"><testcase name="test_a"/><testcase name="test_b"><failure
message="x"/></testcase><testcase name="test_c"><error message="y"/></testcase></testsuite>
</testsuites>"""


def test_junit(tmp_path: Path) -> None:
    path = tmp_path / "pytest.xml"
    path.write_text(JUNIT)
    assert gpu_results.read_pytest(path, "") == Reading(
        "6 passed, 2 failed, 2 skipped", "test_b, test_c"
    )
    path.write_text(JUNIT.replace('errors="1" failures="1"', 'errors="0" failures="0"'))
    assert gpu_results.read_pytest(path, "").problem is None
    path.write_text('<testsuites><testsuite tests="4" skipped="4"/></testsuites>')
    assert gpu_results.read_pytest(path, "all skipped").problem == "no test ran: all skipped"


@pytest.mark.parametrize("xml", [None, JUNIT[:150], "<nothing/>"])
def test_cut_off_junit_is_made_up_for_by_the_log(tmp_path: Path, xml: str | None) -> None:
    path = tmp_path / "pytest.xml"
    if xml is not None:
        path.write_text(xml)
    log = (
        "tests/a.py::test_one[cuda] PASSED   [ 1%]\ntests/a.py::test_two SKIPPED (no) [ 2%]\n"
        "tests/a.py::test_three[b c] FAILED  [ 3%]\ntests/a.py::test_four PASSED [ 4%]\n"
        "tests/a.py::test_five "
    )
    assert gpu_results.read_pytest(path, log) == Reading(
        "2 passed, 1 failed, 1 skipped", "test_three[b c]"
    )


def check_entry(case: str, error: float, limit: float = 1.0) -> dict[str, Any]:
    where = {"op": "attention", "backend": "triton", "dtype": "bfloat16", "case": case}
    return where | {"tensor": "grad0", "error": error, "error_limit": limit}


def test_check_json(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    found = {"checks": [check_entry("a", 0.25), check_entry("b", 0.5)], "failures": []}
    path.write_text(json.dumps(found))
    assert gpu_results.read_check(path, "") == Reading(
        "0 of 2 samples failed, worst 0.50 of its limit (attention triton bfloat16 b grad0)"
    )
    raised = {k: v for k, v in check_entry("c", 0.0).items() if k in ("op", "dtype", "case")}
    found["failures"] = [raised | {"backend": "triton", "raised": "RuntimeError: no"}]
    path.write_text(json.dumps(found))
    reading = gpu_results.read_check(path, "")
    assert reading.figure.startswith("1 of 3 samples failed")
    assert reading.problem == "first: attention triton bfloat16 c"
    path.write_text('{"checks": [], "failures": []}')
    assert gpu_results.read_check(path, "").problem == "no sample was served"
    path.write_text('{"checks": [')
    assert "check.json is not JSON" in str(gpu_results.read_check(path, "x").problem)
    path.unlink()
    assert "Segmentation fault" in str(gpu_results.read_check(path, "Segmentation fault").problem)


def test_sanitizer_log() -> None:
    clean = "14 calls, 0 raised\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_results.read_sanitizer(clean) == Reading("0 errors; 14 calls, 0 raised")
    assert gpu_results.read_sanitizer("==== ERROR SUMMARY: 3 errors\n").problem == "see the log"
    race = "= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert gpu_results.read_sanitizer(race).problem == "see the log"
    none = "= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_results.read_sanitizer(none).problem is None
    assert "Killed" in str(gpu_results.read_sanitizer("...\nKilled\n").problem)
    assert gpu_results.read_sanitizer("Error: Device not supported").skip is not None


def record(case: str, speedup: float, error: float | None = 0.5) -> dict[str, Any]:
    found = {"op": "x", "case": case, "dtype": "float32", "speedup_vs_eager": speedup}
    return found | {"error": error, "error_limit": 1.0}


def results(records: Sequence[Any], **more: Any) -> dict[str, Any]:
    return {"machine": {"cpu": "c"}, "records": list(records), "failed": []} | more


def test_bench_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(results([record("a", 1.0), record("b", 4.0)])))
    assert gpu_results.read_bench(path, "") == Reading(
        "2 cases, 2.00x eager, best 4.00x (b float32)"
    )
    bad = results([record("a", 1.0, 1.5), record("b", 1.0, float("nan"))], failed=["c: died"])
    path.write_text(json.dumps(bad))
    problem = gpu_results.read_bench(path, "").problem
    assert problem == "a float32 is beyond its error limit and 2 more"
    path.write_text(json.dumps(results([], failed=["c: died"])))
    assert gpu_results.read_bench(path, "") == Reading("no case was measured", "c: died")
    path.write_text(json.dumps(results([{"case": "a"}])))
    assert "damaged record" in str(gpu_results.read_bench(path, "").problem)


def test_merged_benchmarks(tmp_path: Path) -> None:
    first = results(
        [record("a", 1.0)], notes=["n"], training=None, overhead=[{"op": "x"}], peers={"a": "1"}
    )
    first["machine"]["ceilings"] = {"copy": 1.0}
    second = results(
        [record("b", 2.0)], notes=["n", "m"], training={"losses": []}, peers={"b": "2"}
    )
    second["machine"]["ceilings"] = {"read": 2.0}
    texts = [json.dumps(first), json.dumps(second)[:-20], json.dumps(second), "[1]", "{}"]
    paths = [tmp_path / f"{i}.json" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    merged, damaged = gpu_results.merge(paths)
    assert [r["case"] for r in merged["records"]] == ["a", "b"]
    assert merged["machine"] == {"cpu": "c", "ceilings": {"copy": 1.0, "read": 2.0}}
    assert merged["notes"] == ["n", "m"]
    assert merged["training"] == {"losses": []}
    assert merged["peers"] == {"a": "1", "b": "2"}
    assert merged["overhead"] == [{"op": "x"}]
    assert [text.split()[0] for text in damaged] == ["1.json", "3.json", "4.json"]
    assert gpu_results.merge([])[0]["records"] == []


def test_rates_do_without_another_make_but_not_without_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bigops.bench import attention_rates

    def fails() -> None:
        raise RuntimeError("head size 256\nis not mine")

    monkeypatch.setattr(attention_rates.torch.cuda, "synchronize", lambda: None)
    missing: dict[str, Any] = {"FlashAttention 4": None}
    both = {"cudnn": lambda: None, "FlashAttention 4": fails}
    for _ in range(2):
        assert list(attention_rates.able(both, missing)) == ["cudnn"]
    assert missing == {"FlashAttention 4": "head size 256"}
    assert capsys.readouterr().err.count("head size 256") == 1
    with pytest.raises(RuntimeError, match="head size 256"):
        attention_rates.able({"triton": fails}, missing)


def test_rates_are_read() -> None:
    log = "$ python -m x\nforward 2x16x8192x128  sm90 608  cudnn 600\nbackward  sm90 617\n"
    found = gpu_results.read_rates("attention_rates", log)
    assert (found.figure, found.problem) == (
        "forward 2x16x8192x128  sm90 608  cudnn 600 and 1 more",
        None,
    )
    refused = gpu_results.read_rates("adam_rates", "$ x\nadam_rates: not built\n")
    assert refused.skip == "not built"
    assert gpu_results.read_rates("adam_rates", "$ x\nboom\n").problem == "none: boom"


# ---- what `bigops bench` does on a GPU only


class GraphClock:
    """Time passes by what a call returns."""

    time = 0.0

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def now(self) -> float:
        return self.time

    def measure(self, call: Any, first: int, count: int) -> float:
        seconds = float(call(first))
        self.time += seconds
        return seconds


def test_who_cannot_be_a_graph_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def host(index: int) -> float:
        raise RuntimeError("Cannot copy between CPU and CUDA tensors during capture\nmore")

    monkeypatch.setattr(records.timing, "GraphClock", GraphClock)
    case: Any = types.SimpleNamespace(title="op case")
    contestants = {"ours": lambda i: 1.0, "eager": lambda i: 4.0, "peer": host, "compile": host}
    known = {"case": "a", "time_ms": 2000.0, "gflops": 6.0, "gbytes": None}
    known |= {"percent_of_limit": 5.0, "peers_ms": dict.fromkeys(("eager", "peer", "compile"), 9.0)}
    effort = records.Effort(seconds=1.0)
    (found,) = records._graph_records(case, contestants, known, effort)
    assert (found["time_ms"], found["eager_ms"], found["speedup_vs_eager"]) == (1e3, 4e3, 4.0)
    assert (found["gflops"], found["percent_of_limit"]) == (12.0, 10.0)
    assert found["peers_ms"] == {"eager": 4e3, "peer": None, "compile": None}
    note = "op case: peer is no CUDA graph: Cannot copy between CPU and CUDA tensors during capture"
    assert effort.notes == [note]
    assert records._graph_records(case, contestants | {"ours": host}, known, effort) == []


def test_truth_is_judged_without_tf32() -> None:
    flags = torch.backends.cudnn.conv
    before = flags.fp32_precision
    case: Any = types.SimpleNamespace(truth=lambda: flags.fp32_precision)
    assert records._truth(case, records.Effort()) == "ieee"
    assert flags.fp32_precision == before
