"""bigops.extension: what is built, when it is built again, and what is said when it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigops import extension
from bigops.extension import BuildError

REASON = extension.why_not()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CUDA_REASON = extension.why_not("cuda")

HEADER = """
#include "view.h"
void twice(const bigops::View& x, const bigops::View& out);
"""
BIND = """
#include "bind/module.h"
#include "bind/tensor.h"
#include "twice.h"
PYBIND11_MODULE(BIGOPS_EXTENSION, m) {
    m.def("twice", &twice, pybind11::call_guard<bigops::Unlocked>());
}
"""
TWICE = """
#include "twice.h"
#include "cpu/vec.h"
using namespace bigops;
void twice(const View& x, const View& out) {
    constexpr int64_t kStep = kLanes<float>;
    for (int64_t i = 0; i < x.numel(); i += kStep) {
        const int count = static_cast<int>(std::min(kStep, x.numel() - i));
        const VecF v = load(x.ptr<float>() + i, count);
        store(out.ptr<float>() + i, v + v, count);
    }
}
"""
CUDA = """
#include "twice.h"
__global__ void kernel(const float* x, float* out) { out[threadIdx.x] = 2 * x[threadIdx.x]; }
void twice(const bigops::View& x, const bigops::View& out) {
    kernel<<<1, 32>>>(x.ptr<float>(), out.ptr<float>());
}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources in a folder whose name has to be quoted, compiled for the first test."""
    folder = tmp_path_factory.mktemp("a project")
    (folder / "pyproject.toml").touch()
    for name, text in (("twice.h", HEADER), ("bind.cpp", BIND)):
        (folder / name).write_text("#pragma once" + text if name == "twice.h" else text)
    (folder / "twice.cpp").write_text("#include <algorithm>" + TWICE)
    return folder


def sources(project: Path) -> list[Path]:
    return [project / "bind.cpp", project / "twice.cpp"]


def times(project: Path) -> dict[str, int]:
    (folder,) = (project / "build" / "bigops").glob("twice-*")
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


RUN = """
import sys, torch
from bigops import extension
module = extension.load("twice", sys.argv[1:])
x = torch.randn(37)
out = torch.empty(37)
module.twice(x, out)
assert torch.equal(out, x + x)
"""


def processes(project: Path, count: int) -> None:
    """So many at once, each of which builds what is needed and computes."""
    command = [sys.executable, "-c", RUN, *map(str, sources(project))]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


@needs_compiler
def test_two_processes_build_once(project: Path) -> None:
    processes(project, 2)
    (log,) = (project / "build" / "bigops").glob("twice-*/.ninja_log")
    outputs = [line.split("\t")[3] for line in log.read_text().splitlines()[1:]]
    assert len(outputs) == len(set(outputs)) == 3


@needs_compiler
def test_a_loaded_module_stays(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = extension.load("twice", sources(project))
    monkeypatch.setattr(extension, "build", None)
    assert extension.load("twice", sources(project)) is module
    x, out = torch.ones(3), torch.empty(3)
    module.twice(x, out)
    assert out.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(TypeError):
        module.twice([1.0], out)


@needs_compiler
def test_only_what_changed_is_built_again(project: Path) -> None:
    extension.build("twice", sources(project))
    before = times(project)
    extension.build("twice", sources(project))
    assert changed(before, times(project)) == set()
    with (project / "twice.cpp").open("a") as file:
        file.write("// a comment\n")
    extension.build("twice", sources(project))
    rebuilt = changed(before, times(project))
    assert rebuilt == {"twice.cpp.o", next(name for name in before if name.endswith(".so"))}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """What ninja made anew; it writes its own files too, and there is a lock."""
    names = {name for name in after if after[name] != before.get(name)}
    return {name for name in names if name.endswith((".o", ".so"))}


@needs_compiler
def test_a_changed_header_is_noticed(project: Path) -> None:
    extension.build("twice", sources(project))
    before = times(project)
    with (project / "twice.h").open("a") as file:
        file.write("// a comment\n")
    extension.build("twice", sources(project))
    assert {"twice.cpp.o", "bind.cpp.o"} < changed(before, times(project))


@needs_compiler
def test_a_compile_error_names_its_line(project: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int f() {\n    return nothing;\n}\n" + "int g() { return nothing; }\n" * 99)
    for _ in range(2):
        with pytest.raises(BuildError) as raised:
            extension.load("wrong", [wrong], folder=tmp_path)
        first, second, *rest = str(raised.value).splitlines()
        assert first == "wrong does not compile:"
        assert second.startswith(f"{wrong}:2:12: error: ")
        assert len(rest) < extension.ERROR_LINES
    assert not list(tmp_path.glob("wrong-*/*.so*"))
    assert not list(tmp_path.glob("wrong-*/*.o"))
    wrong.write_text('#include "bind/tensor.h"\nPYBIND11_MODULE(BIGOPS_EXTENSION, m) {}\n')
    assert extension.load("wrong", [wrong], folder=tmp_path).__name__ == "wrong"


@needs_compiler
def test_without_a_compiler_there_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    reason = extension.why_not()
    assert reason is not None
    assert "'no-such-compiler -O2' is not found" in reason
    with pytest.raises(BuildError, match="twice: no C"):
        extension.build("twice", sources(project))


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("not a name", ["a.cpp"], "name must be a Python identifier"),
        ("name", [], "sources must be files with different names"),
        ("name", ["a.cpp", "b/a.cpp"], "sources must be files with different names"),
        ("name", ["a.c"], r"sources must end in \.cpp or \.cu"),
        ("name", ["absent.cpp"], "sources: there is no file"),
    ],
)
def test_wrong_arguments(
    name: str, files: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        extension.load(name, files)
    assert not list(tmp_path.iterdir())


def test_an_installed_package_builds_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    installed = tmp_path / "lib" / "site-packages" / "relu6" / "a.cpp"
    assert extension._folder(installed).parent == tmp_path / "cache" / "bigops"
    assert extension._folder(tmp_path / "relu6" / "a.cpp") == tmp_path / "build" / "bigops"


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
def test_cuda_is_compiled_without_a_gpu(project: Path) -> None:
    (project / "twice.cu").write_text(CUDA)
    built = extension.build("twice_cuda", [project / "bind.cpp", project / "twice.cu"])
    content = built.read_bytes()
    assert b"PyInit_twice_cuda" in content
    assert b"cudaLaunchKernel" in content
