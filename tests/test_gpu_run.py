"""bench/gpu_run.sh as far as it goes without a GPU: readers, budget, steps, dry and real runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bigops.bench import (
    exercise,
    gpu_machine,
    gpu_plan,
    gpu_results,
    gpu_run,
    gpu_steps,
    records,
)
from bigops.bench.gpu_steps import FAILED, OK, SKIPPED, TIMED_OUT, Reading, Runner, Step, divide

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "bench" / "gpu_run.sh")


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


# ---- budget


def piece(name: str, least: float, most: float, weight: float = 1.0) -> Step:
    return Step(name, lambda seconds: [["true"]], least, most, weight=weight)


def test_time_is_divided_by_weight_beyond_the_least() -> None:
    steps = [piece("a", 10, 100, 3.0), piece("b", 10, 100), piece("c", 20, 100, 0.0)]
    assert divide(80, steps) == {"a": 40.0, "b": 20.0, "c": 20.0}
    # a is full at 100; what it leaves goes on to b.
    assert divide(400, steps[:2]) == {"a": 100.0, "b": 100.0}
    assert divide(170, steps[:2]) == pytest.approx({"a": 100.0, "b": 70.0})


def test_without_time_for_all_the_first_get_their_least() -> None:
    steps = [piece("a", 10, 50), piece("b", 30, 50), piece("c", 8, 50)]
    assert divide(20, steps) == {"a": 11.0, "c": 9.0}
    assert divide(5, steps) == {}
    assert divide(-5, steps) == {}
    assert divide(0.0, [piece("a", 0, 0)]) == {"a": 0.0}


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 7.0, 30.0, 100.0, 250.0, 1e4])
def test_shares_are_within_bounds_and_no_more_than_there_is(seconds: float) -> None:
    steps = gpu_plan.bench_steps(
        Path("out"), "cuda", (), {"adam": 3, "attention": 4, "silent": 0, "new": 1}
    )
    assert [step.name for step in steps] == [
        f"bench {name}" for name in ("attention", "adam", "CNN", "Transformer", "new")
    ]
    shares = divide(seconds, steps)
    assert sum(shares.values()) <= max(seconds, 0.0) + 1e-6
    for step in steps:
        assert step.least <= shares.get(step.name, step.least) <= step.most + 1e-6
        for share in (shares.get(step.name, 0.0), step.most):
            (words,) = step.commands(share)
            assert 0.1 <= float(words[words.index("--seconds") + 1]) <= 3.0


def test_a_benchmark_with_little_time_leaves_things_out() -> None:
    (step,) = gpu_plan.bench_steps(Path("out"), "cuda", ("attention",), {"attention": 4})
    scarce, middling, plenty = (step.commands(s)[0] for s in (step.least, 110.0, 400.0))
    assert "--no-compile" in scarce
    assert "--no-compile" not in middling
    assert "--quick" in middling
    assert "--quick" not in plenty


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


def test_less_time_asks_less_of_each_step_and_more_allows_more() -> None:
    (short,) = gpu_plan.scaled([piece("a", 30, 150)], 2.0)
    (long,) = gpu_plan.scaled([piece("a", 30, 150)], 20.0)
    assert (short.least, short.most, long.least, long.most) == (30, 150.0, 30, 300.0)


def test_with_little_time_the_most_valuable_steps_are_made() -> None:
    steps = [piece("a", 30, 90), piece("b", 40, 90, 2.0), piece("c", 10, 20, 0.5)]
    steps.append(Step("no", steps[0].commands, 5, 9, why_not="no GPU", weight=9.0))

    def made(seconds: float) -> list[str]:
        found = gpu_plan.by_value(steps, seconds)
        assert [step.name for step in found] == ["a", "b", "c", "no"]
        assert found[3].why_not == "no GPU"
        return [step.name for step in found if step.why_not is None]

    assert made(80.0) == ["a", "b", "c"]
    assert made(75.0) == ["a", "b"]
    assert made(50.0) == ["b", "c"]
    assert made(5.0) == []


LATER = {"check", "check-bench", "attention rates", "adam rates"}


@pytest.mark.parametrize(("minutes", "left_out"), [(10.0, set()), (5.0, LATER)])
def test_ten_minutes_hold_everything_and_five_the_most_of_it(
    minutes: float, left_out: set[str], tmp_path: Path
) -> None:
    """By what the steps took on an H200; pytest would have needed about 140 s."""
    took = {"machine": 7, "build": 14, "import": 5, "compile": 62, "memcheck": 9, "racecheck": 11}
    clock = Clock()
    found = {"machine": {"compute-sanitizer": "/bin/true"}}
    run = gpu_run.GpuRun(gpu_run.arguments([str(tmp_path / "out"), "--minutes", str(minutes)]))
    run.runner.clock, run.runner.deadline = clock, run.seconds
    clock.now = sum(took[name] for name in ("machine", "build", "import"))
    proofs = gpu_plan.by_value(run._proofs(found), run.runner.remaining - run._for_speed)
    able = [step for step in proofs if step.why_not is None]
    assert {step.name for step in proofs} - {step.name for step in able} == left_out
    bench = piece("bench", run._for_speed, 0)
    for i, step in enumerate(able):
        limit = run.runner.limit(step, [*able[i + 1 :], bench])
        assert limit >= took.get(step.name, step.least)
        if step.name == "pytest":
            assert limit > (140 if minutes == 10.0 else 75)
            took["pytest"] = 140
        clock.now += min(limit, took.get(step.name, step.least))
    samples = {"attention": 4, "adam": 3, "conv2d_act": 2, "conv2d_relu_max_pool2d": 3}
    benches = gpu_plan.bench_steps(tmp_path, "cuda", (), samples | {"grad_norm": 1})
    shares = divide(run.runner.remaining - gpu_plan.REPORT_SECONDS, benches)
    assert len(shares) >= (len(benches) if minutes == 10.0 else 5)


# ---- steps


class Clock:
    """Moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def runner(out: Path, seconds: float = 60.0, **options: Any) -> Runner:
    clock = options.get("clock", time.monotonic)
    return Runner(out, ROOT, clock() + seconds, {"run": gpu_run.NAME}, **options)


def shell(name: str, *scripts: str, **options: Any) -> Step:
    commands = [["bash", "-c", script] for script in scripts]
    return Step(name, lambda seconds: commands, 0.1, 60, **options)


def test_steps_go_on_after_each_kind_of_failure(tmp_path: Path) -> None:
    def damaged(log: str) -> Reading:
        raise gpu_results.Damaged("x.json is not JSON")

    run = runner(tmp_path)
    steps = [
        shell("good", "echo 7 things", read=lambda log: Reading(log.splitlines()[-1])),
        shell("bad", "echo boom; exit 3"),
        Step("tool", lambda seconds: [["/no/such/tool"]], 1, 10),
        shell("crash", "kill -SEGV $$"),
        shell("damaged", "true", read=damaged),
        shell("told", "true", read=lambda log: Reading("1 of 2", "one is wrong")),
        shell("left out", "true", why_not="no GPU"),
        shell("refused", "exit 1", read=lambda log: Reading(skip="not on this machine")),
        shell("second", "exit 1", "echo did it"),
    ]
    outcomes = [run.carry_out(step, 30.0) for step in steps]
    assert [(r.name, r.outcome, r.figure) for r in outcomes] == [
        ("good", OK, "7 things"),
        ("bad", FAILED, ""),
        ("tool", FAILED, ""),
        ("crash", FAILED, ""),
        ("damaged", FAILED, ""),
        ("told", FAILED, "1 of 2"),
        ("left out", SKIPPED, ""),
        ("refused", SKIPPED, ""),
        ("second", OK, ""),
    ]
    reasons = [r.reason for r in outcomes]
    assert reasons[1] == "exit status 3: boom"
    assert reasons[2] == "exit status 127: /no/such/tool: No such file or directory"
    assert reasons[3].startswith("exit status -11")
    assert reasons[4:6] == ["Damaged: x.json is not JSON", "one is wrong"]
    assert len(outcomes[8].commands) == 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["ok"]
    assert [step["name"] for step in summary["steps"]] == [step.name for step in steps]
    assert (tmp_path / "summary.txt").read_text().count("\n") == len(steps)
    assert not list(tmp_path.glob("*.partial"))


def test_a_step_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE", 0.3)
    run = runner(tmp_path)
    # Deaf to SIGINT, as a process is that waits for a GPU; its child holds the log open.
    step = shell("deaf", "trap '' INT; echo began; sleep 300 & echo $! > child; wait; sleep 300")
    monkeypatch.setattr(run, "root", tmp_path)
    found = run.carry_out(step, 1.0)
    assert (found.outcome, found.reason) == (TIMED_OUT, "after: began")
    assert found.seconds < 20.0
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_step_that_is_asked_to_stop_may_write_what_it_has(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('5 things'), sys.exit(0)))\n"
        "print('began', flush=True); time.sleep(300)"
    )
    step = Step(
        "polite", lambda seconds: [[sys.executable, "-c", code]], 1, 60,
        lambda log: Reading(log.splitlines()[-1]),
    )  # fmt: skip
    found = runner(tmp_path).carry_out(step, 3.0)
    assert (found.outcome, found.figure) == (TIMED_OUT, "5 things")


def test_what_is_done_when_the_time_is_up_may_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE", 0.5)  # the shell's sleep takes no notice

    def outcome(*words: str, partial: bool = True) -> tuple[str, str, str]:
        step = shell(
            "tests", "echo 5 passed; sleep 300", read=lambda log: Reading(*words), partial=partial
        )
        found = runner(tmp_path).carry_out(step, 1.0)
        return found.outcome, found.figure, found.reason

    assert outcome("5 passed") == (OK, "5 passed", "then its time was up")
    failed = outcome("5 passed", "test_b failed")
    assert failed == (FAILED, "5 passed", "test_b failed; then its time was up")
    assert outcome("5 passed", partial=False)[0] == TIMED_OUT


def test_limits_keep_the_least_of_later_steps_and_pass_on_what_is_left(tmp_path: Path) -> None:
    clock = Clock()
    run = runner(tmp_path, 100.0, clock=clock)
    a, b, c = piece("a", 10, 70), piece("b", 20, 30), piece("c", 40, 1e9)
    assert run.limit(a, [b, c]) == 40.0
    clock.now = 5.0  # a needed 5 of its 40
    assert run.limit(b, [c]) == 30.0
    clock.now = 35.0
    assert run.limit(c, []) == 65.0
    skipped = Step("no", c.commands, 40, 50, why_not="no GPU")
    assert run.limit(b, [skipped]) == 30.0
    clock.now = 98.0
    found = run.carry_out(c, run.limit(c, []))
    assert (found.outcome, found.reason) == (SKIPPED, "only 2 s were left")


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


# ---- the command


def launch(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(
        [SCRIPT, *words], capture_output=True, text=True, env=environment, timeout=300, **options
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("new", "--minutes", "0"), "--minutes must be above 0"),
        (("new", "--minutes", "nan"), "--minutes must be above 0"),
        (("taken",), "OUT: taken: is neither empty nor of an earlier run"),
        (("other",), "OUT: other: is neither empty nor of an earlier run"),
        (("file",), "OUT: file: is not a folder"),
        (("file/below",), "cannot be written"),
        ((), "the following arguments are required: OUT"),
    ],
)
def test_a_wrong_word_gets_one_line(
    tmp_path: Path, words: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for name, text in (("taken/notes.txt", "mine"), ("other/summary.json", '{"run": "else"}')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        gpu_run.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_what_an_earlier_run_left_goes_and_what_is_not_its_stays(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    for name in ("bench/old.json", "check.json", "check.log", "kept.md"):
        (tmp_path / name).touch()
    (tmp_path / "summary.json").write_text(json.dumps({"run": gpu_run.NAME}))
    assert gpu_run.unusable(tmp_path) is None
    gpu_run.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench", "kept.md"]
    assert not list((tmp_path / "bench").iterdir())


def test_a_dry_run_names_every_step_and_writes_nothing(tmp_path: Path) -> None:
    done = launch(str(tmp_path / "out"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    first = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    order = ["machine", "build", "import", "compile", "pytest", "memcheck", "racecheck"]
    assert first[1 : 1 + len(order)] == order
    steps = [line for line in done.stdout.splitlines() if "about" in line or "skipped:" in line]
    named = [" ".join(line[:30].split()) for line in steps]
    assert named.index("bench attention") < named.index("bench CNN") < named.index("report")
    shares = [float(line.split("about ")[1].split()[0]) for line in steps if "about" in line]
    assert sum(shares) <= 600.0 + len(shares)  # they are rounded
    assert {"tests/test_gpu.py", "tests/test_gpu_limits.py"} <= set(done.stdout.split())
    assert "tests/test_ops.py" not in done.stdout
    for command in (
        "-m bigops.bench.adam_rates",
        "-m pytest -m gpu",
        "check --device cuda",
        "--bench --jobs",
        "--report ''",
    ):
        assert command in done.stdout


def test_bigops_can_be_imported_without_being_installed(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(2):  # what is there stays
        gpu_run.link_package(folder)
    environment = gpu_run.child_environment() | {"PYTHONPATH": str(folder)}
    # -S: no site-packages, and with it no editable install that would serve; torch is added back.
    code = f"import sys; sys.path += {[p for p in sys.path if 'site-packages' in p]}\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code + gpu_plan.PROBE],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["path"] == str(folder / "bigops" / "__init__.py")
    assert found["samples"]["attention"] >= 1


def test_exercise_takes_turns_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    todo = exercise.calls("cpu", ["grad_norm", "attention"])
    assert [call[0].name for call in todo[:4]] == ["grad_norm", "attention"] * 2
    assert len(exercise.calls("cpu", ["grad_norm"], bench=True)) > len(
        exercise.calls("cpu", ["grad_norm"])
    )
    assert exercise.exercise(todo[:6], "cpu", 60.0) == 0
    assert capsys.readouterr().out == "6 calls, 0 raised\n"
    assert exercise.exercise(todo, "cpu", -1.0) == 0
    op, sample, backend, dtype = todo[0]

    class Broken:
        name = op.name

        def function(self, *args: Any) -> None:
            raise RuntimeError("an illegal memory access was encountered\nmore")

    assert exercise.exercise([(Broken(), sample, backend, dtype)], "cpu", 60.0) == 1  # type: ignore[list-item]
    printed = capsys.readouterr().out
    assert "RuntimeError: an illegal memory access was encountered\n" in printed
    assert printed.endswith("0 calls, 1 raised\n")


def test_exercise_in_several_processes() -> None:
    command = [sys.executable, "-m", "bigops.bench.exercise", "grad_norm", "--device", "cpu"]
    done = subprocess.run([*command, "--jobs", "2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count = len(exercise.calls("cpu", ["grad_norm"]))
    assert gpu_results.read_calls(done.stdout).figure == f"{count} calls, 0 raised"


def test_a_run_on_the_cpu_from_end_to_end(tmp_path: Path) -> None:
    """A small op, and the installed build; the report and the records are as of a benchmark."""
    out = tmp_path / "out"
    done = launch(str(out), "grad_norm", "--device", "cpu", "--no-build", "--minutes", "4")
    summary = json.loads((out / "summary.json").read_text())
    outcomes = {step["name"]: step["outcome"] for step in summary["steps"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, outcome in outcomes.items() if outcome == OK} == {
        *("machine", "import", "check", "check-bench", "bench grad_norm", "report")
    }
    assert TIMED_OUT not in outcomes.values()
    assert summary["ok"]
    records = json.loads((out / "records.json").read_text())["records"]
    assert {record["op"] for record in records} == {"grad_norm"}
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    table = done.stdout.rsplit(f"{out}:\n", 1)[1]
    assert table == (out / "summary.txt").read_text()
    assert "0 of 12 samples failed" in table


def test_a_run_that_is_told_to_stop_writes_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [SCRIPT, str(out), "grad_norm", "--device", "cpu", "--no-build"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    end = time.monotonic() + 120.0
    while not (out / "import.log").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60.0)
    assert process.returncode == 128 + signal.SIGTERM
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stopped"] == "SIGTERM"
    assert not summary["ok"]
    last = {step["name"]: (step["outcome"], step["reason"]) for step in summary["steps"]}
    assert last["machine"][0] == OK
    assert last["import"] == (FAILED, "stopped")
    assert output.rstrip().splitlines()[-1].startswith("report ")


def test_unknown_ops_are_named_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(str(out), "atention", "--device", "cpu", "--no-build")
    assert done.returncode == 1
    steps = {step["name"]: step for step in json.loads((out / "summary.json").read_text())["steps"]}
    assert steps["import"]["reason"].startswith("unknown: atention; known: ")
    assert steps["check"]["reason"] == "see import"
    assert steps["bench"]["outcome"] == SKIPPED
