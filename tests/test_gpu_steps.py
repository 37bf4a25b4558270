"""bench/gpu_run.sh without a GPU: how it divides its time, and how it carries out a step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bigops.bench import gpu_plan, gpu_results, gpu_run, gpu_steps
from bigops.bench.gpu_steps import FAILED, OK, SKIPPED, TIMED_OUT, Reading, Runner, Step, divide

ROOT = Path(__file__).resolve().parents[1]


# ---- budget


class Clock:
    """Moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


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
