"""bench/gpu_run.sh as far as it goes without a GPU: the command, dry and real runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bigops.bench import exercise, gpu_plan, gpu_results, gpu_run
from bigops.bench.gpu_steps import FAILED, OK, SKIPPED, TIMED_OUT

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "bench" / "gpu_run.sh")


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
