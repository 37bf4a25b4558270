"""Somebody's own C++ and CUDA C++ kernels: built by ninja when first asked for, and again where a
source or a header has changed.

    kernels = extension.load("relu6_cpu", [CSRC / "bind.cpp", CSRC / "relu6.cpp"])

Sources see tensors as `bigops::View` (`#include "bind/tensor.h"`) and no header of torch, so they
compile in seconds and outlive torch's releases. `"cpu/vec.h"` has the vectors of the CPU kernels.
A binding reads `PYBIND11_MODULE(BIGOPS_EXTENSION, m) { ... }`. Files whose names begin with `bind`
are compiled fast, all others to fast code: with the flags of bigops' own kernels for this
processor's best instruction set (`.cpp`) or by nvcc for this machine's GPU (`.cu`).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from .backends import flags, native

ERROR_LINES = 8  # of a compiler's message
DEFAULT_GPU = "-arch=sm_80"  # where there is none: its code and PTX for all later ones


class BuildError(RuntimeError):
    """The sources do not compile, or nothing here can compile them."""


_loaded: dict[tuple[str, ...], ModuleType] = {}
_failed: dict[tuple[str, ...], tuple[list[int], str]] = {}  # the sources' times, the message
_one_loads = threading.Lock()


def include() -> Path:
    """The folder of the headers: in the wheel, or beside the package in the source tree."""
    package = Path(__file__).resolve().parent
    return next(
        folder
        for folder in (package / "csrc", package.parent / "csrc")
        if (folder / "view.h").is_file()
    )


def why_not(device: str = "cpu") -> str | None:
    """None when extensions for tensors of `device` (cpu or cuda) can be built, else the reason."""
    if _found(_compiler()) is None:
        return f"no C++ compiler: {_compiler()!r} is not found (install g++, or set CXX)"
    if device == "cuda" and _found("nvcc") is None:
        return "nvcc is not found (install the CUDA toolkit)"
    for module in ("ninja", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"building needs {module}: pip install {module}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are not installed (python3-dev)"
    return None


def load(
    name: str, sources: Sequence[str | Path], *, folder: str | Path | None = None
) -> ModuleType:
    """Build what has changed and import the module; once a process, later calls return the same.

    Args:
        name: of the module; a Python identifier.
        sources: .cpp and .cu files with different names.
        folder: where to build; by default build/bigops beside the pyproject.toml above the first
            source, and for an installed package a folder of the user's cache.

    Raises:
        BuildError: with the first lines of the compiler's message, or the reason of `why_not`.
        ValueError, FileNotFoundError: naming the argument.

    Safe in several threads and processes at once: one builds, the others wait.
    """
    key = (name, *(str(Path(source).resolve()) for source in sources))
    with _one_loads:
        if key not in _loaded:
            path = _build_once(key, folder)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            _loaded[key] = module
        return _loaded[key]


def _build_once(key: tuple[str, ...], folder: str | Path | None) -> Path:
    """What does not compile is not tried again as it is: a test suite asks in every test."""
    name, *sources = key
    times = [path.stat().st_mtime_ns for path in map(Path, sources) if path.is_file()]
    if key in _failed and _failed[key][0] == times:
        raise BuildError(_failed[key][1])
    try:
        return build(name, sources, folder=folder)
    except BuildError as error:
        _failed[key] = times, str(error)
        raise


def build(name: str, sources: Sequence[str | Path], *, folder: str | Path | None = None) -> Path:
    """As `load`, but the module is not imported: its file."""
    paths = _checked(name, sources)
    cuda = any(path.suffix == ".cu" for path in paths)
    if (reason := why_not("cuda" if cuda else "cpu")) is not None:
        raise BuildError(f"{name}: {reason}")
    place = Path(folder) if folder is not None else _folder(paths[0])
    place = place.resolve() / f"{name}-{sys.implementation.cache_tag}-{native.ISA or 'base'}"
    place.mkdir(parents=True, exist_ok=True)
    module = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(place / "build.ninja", _ninja_file(name, paths, module, cuda))
        command = [sys.executable, "-m", "ninja", "-C", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{name} does not compile:\n{_first_error(done.stdout + done.stderr)}")
    return place / module


def _checked(name: str, sources: Sequence[str | Path]) -> list[Path]:
    if not name.isidentifier():
        raise ValueError(f"name must be a Python identifier, got {name!r}")
    paths = [Path(source).resolve() for source in sources]
    if not paths or len({path.name for path in paths}) < len(paths):
        raise ValueError(f"sources must be files with different names, got {sources}")
    for path in paths:
        if path.suffix not in (".cpp", ".cu"):
            raise ValueError(f"sources must end in .cpp or .cu, got {path}")
        if not path.is_file():
            raise FileNotFoundError(f"sources: there is no file {path}")
    return paths


def _folder(source: Path) -> Path:
    for parent in source.parents:
        if parent.name in ("site-packages", "dist-packages"):
            break
        if (parent / "pyproject.toml").is_file():
            return parent / "build" / "bigops"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "bigops" / hashlib.sha256(str(source.parent).encode()).hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _found(command: str) -> str | None:
    return shutil.which(shlex.split(command)[0])


def _write(path: Path, text: str) -> None:
    """Nothing, if the file reads so already: ninja takes a newer build file for a new one."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _ninja_file(name: str, sources: list[Path], module: str, cuda: bool) -> str:
    import pybind11

    headers = [include(), Path(sysconfig.get_path("include")), Path(pybind11.get_include())]
    common = f"-DBIGOPS_EXTENSION={name} {_quoted('-I', headers[:1])} "
    common += _quoted("-isystem ", headers[1:])
    isa = flags.ISA_FLAGS.get(native.ISA or "", "")
    commands = {
        "binding": f"$cxx {flags.BINDING} {flags.WARN} {common}",
        "kernel": f"$cxx {flags.KERNEL} {isa} {flags.WARN} {common}",
        "cuda": f"nvcc -std=c++20 -O3 {_gpu()} -Xcompiler=-fPIC,-fvisibility=hidden {common}",
    }
    lines = [f"cxx = {_compiler()}"]
    for rule, command in commands.items():
        lines += [
            f"rule {rule}",
            f"  command = {command} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
        ]
    # nvcc links the CUDA runtime statically. A new file, not new content: a process may have the
    # old one mapped.
    linker = "nvcc -Xcompiler=-fopenmp" if cuda else "$cxx -fopenmp"
    lines += [
        "rule link",
        f"  command = {linker} -shared $in -o $out.partial && mv -f $out.partial $out",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        binding = "binding" if source.name.startswith("bind") else "kernel"
        rule = "cuda" if source.suffix == ".cu" else binding
        objects.append(f"{source.name}.o")
        lines.append(f"build {_escaped(objects[-1])}: {rule} {_escaped(str(source))}")
    lines.append(f"build {module}: link {' '.join(map(_escaped, objects))}")
    return "\n".join(lines) + "\n"


def _quoted(option: str, folders: list[Path]) -> str:
    return " ".join(option + shlex.quote(str(path)) for path in folders).replace("$", "$$")


def _escaped(path: str) -> str:
    return re.sub(r"[$ :]", r"$\g<0>", path)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return DEFAULT_GPU
    return "-arch=sm_{}{}".format(*torch.cuda.get_device_capability())


def _first_error(output: str) -> str:
    """The first error among what ninja prints, after its repetition of the whole command."""
    lines = output.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if re.search(r"error[ :]|undefined", line)), 0)
    return "\n".join(lines[first : first + ERROR_LINES])
