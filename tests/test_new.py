"""`bigops new`: the project passes as it is written, and a wrong word writes nothing.

Its commands run as a user's do: in its folder, in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bigops import extension
from bigops.backends import triton
from bigops.cli import main, new

# -P: as for an installed script, the current folder is not on the path.
BIGOPS = [sys.executable, "-P", "-c", "import sys; from bigops.cli import main; sys.exit(main())"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
REASON = extension.why_not()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_triton = pytest.mark.skipif(not triton.INSTALLED, reason="triton is not installed")


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run(
        command,
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def write(name: str, folder: Path, *options: str) -> Path:
    assert main(["new", name, str(folder), *options]) == 0
    return folder


def passes(folder: Path, *command: str) -> str:
    done = run(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_a_project_passes_as_it_is_written(tmp_path: Path) -> None:
    """Under a name that is also the one of an argument inside."""
    folder = write("x", tmp_path / "project")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "README.md", "pyproject.toml", "tests/test_x.py",
        "x/__init__.py", "x/kernels.py", "x/reference.py",
    }  # fmt: skip
    for path in folder.rglob("*.*"):
        assert path.is_dir() or not re.search("relu6|--c(pp|uda)", path.read_text()), path
    tests = passes(folder, *PYTEST)
    assert re.search(r"\d\d passed", tests)
    assert "skipped" not in tests
    # No other backend is there: Triton is interpreted without being asked for.
    checked = passes(folder, *BIGOPS, "check", "--json", "found.json")
    assert "0 samples failed" in checked
    found = json.loads((folder / "found.json").read_text())
    triples = {(c["op"], c["backend"], c["dtype"]) for c in found["checks"]}
    assert triples == {("x", "triton", dtype) for dtype in ("float32", "bfloat16", "float16")}


@needs_triton
@needs_compiler
def test_a_project_with_native_kernels(tmp_path: Path) -> None:
    folder = write("relu6", tmp_path / "relu6", "--cpp", "--cuda")
    tests = passes(folder, *PYTEST)
    cuda = extension.why_not("cuda")
    skipped = [line for line in tests.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == (cuda is not None), tests
    assert all(str(cuda) in line for line in skipped)
    assert list(folder.glob("build/bigops/relu6_cpu-*/relu6_cpu*.so"))
    checked = passes(folder, *BIGOPS, "check")
    assert "relu6  native" in checked
    assert "0 samples failed" in checked
    explained = "import bigops, relu6, torch; print(bigops.explain(relu6.relu6, torch.ones(3)))"
    assert passes(folder, sys.executable, "-c", explained).startswith("bigops.relu6: native\n")


@pytest.mark.slow
@needs_compiler
def test_bench_of_a_project(tmp_path: Path) -> None:
    folder = write("relu6", tmp_path / "relu6", "--cpp")
    text = folder / "relu6" / "__init__.py"
    text.write_text(text.read_text().replace("4096, 4096, bench", "64, 64, bench"))
    words = ("bench", "--seconds", "0.05", "--no-compile", "--dtype", "fp32", "--report", "")
    passes(folder, *BIGOPS, *words, "--json", "found.json")
    found = json.loads((folder / "found.json").read_text())
    (record,) = found["records"]
    assert (record["op"], record["backend"]) == ("relu6", "native")
    assert record["error"] <= record["error_limit"]
    assert record["peak_bytes"] is not None  # another process found the op
    assert [found["op"] for found in found["overhead"]] == ["relu6"] * 2


def test_in_another_folder_the_table_is_as_it_was(tmp_path: Path) -> None:
    write("relu6", tmp_path / "relu6")
    done = run(tmp_path, *BIGOPS, "check", "relu6")
    assert done.returncode == 2
    assert done.stderr.startswith("bigops check: unknown op 'relu6'; known: ")


def installed(folder: Path, name: str, module: str) -> str:
    """Metadata as of an installed package with this entry point; what PYTHONPATH has to hold."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[bigops.ops]\n{name} = {module}\n")
    return str(folder)


@needs_triton
def test_an_installed_op_is_found_anywhere(tmp_path: Path) -> None:
    project = write("relu6", tmp_path / "site")
    path = installed(project, "relu6", "relu6")
    words = ("check", "relu6", "--dtype", "fp32", "--case", "odd")
    done = run(tmp_path, *BIGOPS, *words, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "1 samples checked, 2 tensors compared, 0 samples failed" in done.stdout


BROKEN = "raise RuntimeError('no driver\\nsecond line')"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (BROKEN, "RuntimeError: no driver"),
        pytest.param(
            "import absent_module",
            "ModuleNotFoundError: No module named 'absent_module'",
            marks=pytest.mark.slow,
        ),
        pytest.param("", "module broken has no bigops.ops.Op", marks=pytest.mark.slow),
    ],
)
def test_a_broken_plugin_is_told_in_one_line(tmp_path: Path, code: str, reason: str) -> None:
    path = installed(tmp_path / "site", "broken", "broken")
    (tmp_path / "site" / "broken.py").write_text(code)
    asked = run(tmp_path, *BIGOPS, "check", "broken", PYTHONPATH=path)
    assert asked.returncode == 2
    assert asked.stderr == f"bigops check: plugin broken: {reason}\n"
    words = ("check", "attention", "--dtype", "fp32", "--case", "gradcheck")
    other = run(tmp_path, *BIGOPS, *words, PYTHONPATH=path)
    assert other.returncode == 0
    assert other.stderr == f"bigops: plugin broken: {reason}\n"


def test_a_project_that_cannot_be_imported(tmp_path: Path) -> None:
    folder = write("relu6", tmp_path / "relu6")
    (folder / "relu6" / "reference.py").write_text("syntax error")
    done = run(folder, *BIGOPS, "check")
    assert done.returncode == 2
    assert done.stderr.startswith("bigops check: plugin relu6: SyntaxError: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("6relu", "is not a Python identifier"),
        ("re-lu", "is not a Python identifier"),
        ("größe", "is not a Python identifier of ASCII"),
        ("__main__", "is not a Python identifier"),
        ("lambda", "is a keyword"),
        ("attention", "is an op already"),
        ("attention_backward", "is an op already"),
        ("torch", "is a module already"),
        ("math", "is a module already"),
        ("Tensor", "means something else within the project"),
        ("reference", "means something else within the project"),
        ("float", "means something else within the project"),
    ],
)
def test_names_that_no_op_can_have(
    name: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bigops new: NAME: {name!r} {reason}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["relu6", "_x", "x_", "template", "match", "Mish", "abs", "shape"])
def test_names_that_an_op_can_have(name: str) -> None:
    new.check_name(name)
    files = new.project(name, {"--cpp", "--cuda"})
    for where, text in files.items():
        if where.endswith(".py"):
            compile(text, where, "exec")
    project = files["pyproject.toml"]
    assert re.search(r'^name = "bigops-[a-zA-Z](\w*[a-zA-Z0-9])?"$', project, re.M)


def test_a_folder_with_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    for where in ("full", "file", "no/such/folder", "file/below"):
        assert main(["new", "relu6", where]) == 2
        err = capsys.readouterr().err
        assert err.startswith("bigops new: DIR: ")
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]
    (tmp_path / "empty").mkdir()
    write("relu6", Path("empty"))
    assert (tmp_path / "empty" / "pyproject.toml").is_file()


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(new.os, "replace", full)
    assert main(["new", "relu6", str(tmp_path / "relu6")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


WRONG = textwrap.dedent("""
    import bigops.testing
    from relu6 import OP

    def test_all():
        for case in bigops.testing.cases(OP):
            case.check()
""")


@needs_triton
def test_a_wrong_kernel_fails_its_projects_test(tmp_path: Path) -> None:
    folder = write("relu6", tmp_path / "relu6")
    kernels = folder / "relu6" / "kernels.py"
    kernels.write_text(kernels.read_text().replace("x > 6.0, 6.0, x)", "x > 6.0, 5.0, x)"))
    (folder / "tests" / "test_relu6.py").write_text(WRONG)
    done = run(folder, *PYTEST)
    assert done.returncode == 1
    assert re.search(r"relu6-triton-float32-gradcheck: out: .* got 5, wanted 6", done.stdout)
