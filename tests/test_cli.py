"""doctor, check and bench as a user types them: exit status, messages, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigops.bench import ceilings
from bigops.bench import run as bench_run
from bigops.cli import bench as bench_command
from bigops.cli import doctor, main
from bigops.ops import Backend, Cost, Op, Sample, declare
from bigops.ops.dispatch import is_fast


def toy_function(x: torch.Tensor) -> torch.Tensor:
    return x * Toy.factor if is_fast(TOY, (x,)) else x + x


class Toy:
    """What the fast backend of the toy op multiplies by; 2 is right."""

    factor = 2.0


def _toy_sample(name: str, count: int, bench: bool) -> Sample:
    def make(device: str, dtype: torch.dtype) -> Any:
        return (torch.randn(count, device=device, dtype=dtype).requires_grad_(),), {}

    return Sample(name, make, bench=bench)


TOY = Op(
    name="toy",
    function=toy_function,
    eager=lambda x: x + x,
    backends=(
        Backend("native", ("cpu",), lambda x: None, lambda x: x),
        Backend("triton", ("cuda",), lambda x: None, lambda x: x),
    ),
    samples=(_toy_sample("tiny", 3, False), _toy_sample("large", 5000, True)),
    dtypes=(torch.float32, torch.bfloat16),
    cost=lambda passes, x: Cost(float(x.numel()), 8.0 * x.numel()),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An op that is quick to run, in the table; a folder of its own."""
    monkeypatch.setitem(declare.__globals__["_table"], "toy", TOY)
    monkeypatch.setattr(ceilings, "BUDGET", 0.005)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (64,)})
    monkeypatch.chdir(tmp_path)


QUICK = ("bench", "toy", "--quick", "--seconds", "0.02", "--no-compile", "--dtype", "float32")


def run(*words: str) -> int:
    """The exit status; argparse's own exits included."""
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "nope"), "unknown op 'nope'; known: "),
        (
            ("check", "--backend", "cuda"),
            "unknown backend 'cuda'; known: native, triton, reference",
        ),
        (("check", "--dtype", "int8"), "unknown dtype 'int8'; known: float32"),
        (("check", "--device", "tpu"), "device: 'tpu' cannot be used"),
        (("check", "toy", "--case", "zzz"), "no sample has 'zzz' in its name"),
        (("check", "toy", "--json", "no/such/x.json"), "--json: there is no folder"),
        (("check", "toy", "--json", "."), "--json: . is a folder"),
        (("bench", "nope"), "unknown op 'nope'"),
        (("bench", "toy", "--backend", "x"), "unknown backend 'x'"),
        (("bench", "toy", "--backend", "triton"), "--backend triton needs a GPU"),
        (("bench", "toy", "--dtype", "x"), "unknown dtype 'x'"),
        (("bench", "toy", "--device", "x"), "device: 'x' cannot be used"),
        (("bench", "toy", "--case", "zzz"), "no case has 'zzz' in its name"),
        (("bench", "toy", "--threads", "0"), "--threads must be"),
        (("bench", "toy", "--seconds", "nan"), "--seconds must be"),
        (("bench", "toy", "--json", "no/such/x.json"), "--json: there is no folder"),
        (("bench", "toy", "--report", "no/such/x.html"), "--report: there is no folder"),
        (("bench", "toy", "--update-readme", "absent.md"), "--update-readme: absent.md: No such"),
        (("doctor", "--json", "no/such/x.json"), "--json: there is no folder"),
    ],
)
def test_wrong_words(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"bigops {words[0]}: {message}")
    assert err.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words", [(), ("nope",), ("check", "--nope"), ("bench", "--threads", "x")])
def test_argparse_refuses(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith("bigops")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "bench", "doctor", "train"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "usage: bigops" in capsys.readouterr().out


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "toy", "--json", "found.json") == 0
    out = capsys.readouterr().out
    assert "2 samples checked, 4 tensors compared, 0 samples failed" in out
    assert "not available: triton: " in out
    found = json.loads(Path("found.json").read_text())
    assert {(c["backend"], c["dtype"], c["tensor"]) for c in found["checks"]} == {
        ("native", dtype, tensor)
        for dtype in ("float32", "bfloat16")
        for tensor in ("out", "grad0")
    }
    assert found["failures"] == []
    assert [path.name for path in Path().iterdir()] == ["found.json"]


def test_check_of_a_wrong_backend_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Toy, "factor", 2.01)
    assert run("check", "toy", "--dtype", "fp32", "--json", "found.json") == 1
    out = capsys.readouterr().out
    assert "FAILED toy native float32 tiny: out: max error" in out
    assert "limit" in out
    assert "1 samples failed" in out
    failures = json.loads(Path("found.json").read_text())["failures"]
    assert {f["tensor"] for f in failures} == {"out", "grad0"}
    assert all(f["error"] > f["error_limit"] for f in failures)


def test_check_of_a_backend_that_raises_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Toy, "factor", None)
    assert run("check", "toy", "--dtype", "fp32") == 1
    assert "FAILED toy native float32 tiny: TypeError: " in capsys.readouterr().out


def test_check_interprets_triton_in_a_process_of_its_own() -> None:
    """The words reach the process, and so does the environment."""
    code = """
import os, subprocess, sys
from bigops.cli import main
def call(command, env):
    print(env["TRITON_INTERPRET"], *command[3:])
    return 7
subprocess.call = call
sys.exit(main(["check", "attention", "--backend", "triton", "--dtype", "fp32", "--case", "odd"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    words = "1 check attention --backend triton --device cpu --dtype fp32 --case odd"
    assert done.stdout.strip() == words


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*QUICK, "--json", "found.json") == 0
    out = capsys.readouterr().out
    assert "Speed and truth" in out
    assert "Call overhead" in out
    found = json.loads(Path("found.json").read_text())
    assert [r["case"] for r in found["records"]] == ["large"]
    assert found["machine"]["torch"] == torch.__version__
    assert "<svg" in Path("bigops-report.html").read_text()
    assert {path.name for path in Path().iterdir()} == {"found.json", "bigops-report.html"}


def test_bench_of_a_wrong_backend_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Toy, "factor", 2.01)
    assert run(*QUICK, "--report", "") == 1
    err = capsys.readouterr().err
    assert "bigops bench: toy large float32: error" in err
    assert "exceeds its limit" in err


def test_bench_writes_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    readme = Path("README.md")
    readme.write_text("# A\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n")
    assert run(*QUICK, "--report", "", "--markdown", "--update-readme", "README.md") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("<!-- bench:begin -->")
    assert readme.read_text() == f"# A\n{printed.rstrip()}\nafter\n"
    readme.write_text("no markers")
    assert run(*QUICK, "--update-readme", "README.md") == 2
    assert readme.read_text() == "no markers"


def test_bench_interrupted_before_a_record_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TOY, "cost", interrupted)
    assert run(*QUICK, "--json", "found.json") == 130
    assert not list(Path().iterdir())


def test_bench_interrupted_writes_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench_run.measure

    def interrupted(case: Any, *rest: Any) -> Any:
        if case.dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(bench_run, "measure", interrupted)
    Path("README.md").write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    dtypes = ("--dtype", "float32", "--dtype", "bfloat16")
    files = ("--json", "found.json", "--update-readme", "README.md")
    assert run(*QUICK, *dtypes, *files) == 130
    found = json.loads(Path("found.json").read_text())
    assert [record["dtype"] for record in found["records"]] == ["float32"]
    assert found["stopped"]
    assert "stopped" in capsys.readouterr().err
    assert Path("README.md").read_text() == "<!-- bench:begin -->\n<!-- bench:end -->\n"


def test_bench_chooses_ops_and_models() -> None:
    def plan(*words: str) -> Any:
        args = _parser().parse_args(["bench", *words])
        return bench_command._plan(args)

    models = ("CNN", "ResNet18", "Transformer")
    assert (plan().models, plan().ops, plan().training) == (models, (), True)
    assert (plan("toy").models, plan("toy").ops, plan("toy").training) == ((), ("toy",), False)
    only_cnn = plan("cnn")
    assert (only_cnn.models, only_cnn.with_ops, only_cnn.training) == (("CNN",), False, True)


def _parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    bench_command.add_parser(parser.add_subparsers())
    return parser


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        doctor, "SMOKE", "import sys; sys.exit('broken' * (sys.argv[1] == 'native') or 0)"
    )
    assert run("doctor", "--json", "found.json") == 0
    out = capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    states = {(b["name"], b["device"]): b["problem"] for b in found["backends"]}
    assert states["reference", "cpu"] is None
    assert states["native", "cpu"] is not None
    assert torch.__version__ in out
    assert "bigops check --backend native says more" in out or "no C++ compiler" in out


def test_doctor_tries_backends_for_real() -> None:
    done = subprocess.run(
        [sys.executable, "-c", doctor.SMOKE, "reference", "cpu", *doctor.SMALL],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_command.words, "has_rich", lambda: False)
    assert run(*QUICK, "--report", "") == 0
    assert 'pip install "bigops[bench]"' in capsys.readouterr().out
