"""g++ makes the model, one shared object per build, and each kernel file, which is linked to it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import extension
from ..extension import BuildError

COMMON = (
    "-std=c++20 -fPIC -pthread -g1 -march=native -fno-omit-frame-pointer "
    "-fno-optimize-sibling-calls -fno-gnu-unique -fno-math-errno -fvisibility-inlines-hidden "
    "-Wall -Wextra"
)
MODEL = "-O3 -fno-trapping-math"
KERNEL = "-DBIGOPS_SIMT -Wno-unknown-pragmas"
# Per build what the model gets, the kernel, and the kernel's link. "race" is GCC's instrumentation
# of ThreadSanitizer, with the model's own functions behind it and without that library.
BUILDS = {
    "plain": ("", "-O2", "-Wl,-z,defs"),
    "race": (
        "-DBIGOPS_SIMT_RACE",
        "-O1 -fsanitize=thread --param=tsan-distinguish-volatile=1",
        "-Wl,-z,defs,--wrap=memcpy,--wrap=memmove,--wrap=memset",
    ),
    "address": (
        "-fsanitize=address -DBIGOPS_SIMT_ADDRESS",
        "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all",
        "-fsanitize=address,undefined",
    ),
}
# Functions that a kernel has too, of templates, are instrumented there: the model calls its own.
SYMBOLIC = "-Wl,-Bsymbolic-functions"
# A kernel that calls nothing of the model is run by it all the same.
NEEDED = "-Wl,--no-as-needed"
PROGRAM = "address_main.cpp"  # of the address build; all other files are the model


def why_not() -> str | None:
    """None when kernels can be built here, else the reason."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "the CPU model of CUDA runs on x86-64 Linux"
    for tool in (_compiler()[0], "readelf", "c++filt", "addr2line"):
        if shutil.which(tool) is None:
            return f"{tool!r} is not found (install g++ with its binutils, or set CXX)"
    return None


def kernel(source: Path, build: str, flags: tuple[str, ...]) -> Path:
    """The shared object of a kernel file."""
    if build not in BUILDS:
        raise ValueError(f"build must be one of {', '.join(BUILDS)}, got {build!r}")
    if not source.is_file():
        raise FileNotFoundError(f"source: there is no file {source}")
    if (reason := why_not()) is not None:
        raise BuildError(reason)
    _, compiling, linking = BUILDS[build]
    words = ["-include", str(_sources() / "cuda.h"), *_includes(), *shlex.split(KERNEL)]
    command = [*shlex.split(f"{COMMON} {compiling}"), *words, *flags, "-xc++"]
    parts = [_object(source, command), _model(build)]
    return _linked(f"{source.stem}-{build}.so", parts, ["-shared", linking])


def address_program() -> Path:
    """What runs a kernel of the address build in a process of its own."""
    command = shlex.split(f"{COMMON} {MODEL} {BUILDS['address'][0]}")
    main = _object(_sources() / PROGRAM, [*command, *_includes()])
    return _linked("address", [main, _model("address")], ["-fsanitize=address"])


def _model(build: str) -> Path:
    command = [*shlex.split(f"{COMMON} {MODEL} {BUILDS[build][0]}"), *_includes()]
    sources = sorted(path for path in _sources().glob("*.cpp") if path.name != PROGRAM)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _object(source, command), sources))
    sanitizer = ["-fsanitize=address"] if build == "address" else []
    return _linked(f"model-{build}.so", objects, ["-shared", "-pthread", SYMBOLIC, *sanitizer])


def _sources() -> Path:
    return extension.include() / "simt"


def _includes() -> list[str]:
    return [f"-I{_sources() / 'include'}"]


def _place() -> Path:
    place = extension._folder(extension.include() / "view.h") / "simt"
    place.mkdir(parents=True, exist_ok=True)
    return place


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def _processor() -> str:
    """-march=native makes other code on another processor, which may see the same folder."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return line
    return ""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _content(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def _temporary(path: Path) -> Path:
    """Renamed when complete: others may build the same at the same time."""
    return path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")


def _compile(command: Sequence[str], target: Path) -> None:
    partial = _temporary(target)
    done = subprocess.run(
        [*_compiler(), *command, "-o", str(partial)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BuildError(extension._first_error(done.stderr))
    partial.replace(target)


def _object(source: Path, flags: list[str]) -> Path:
    """The object file, named by the contents of all that it is made of."""
    key = _digest(str(source), *_compiler(), *flags, _processor())
    record = _place() / f"{source.stem}-{key}.json"
    with contextlib.suppress(OSError, ValueError):
        made = json.loads(record.read_text())
        if Path(made["object"]).is_file() and all(
            _content(path) == content for path, content in made["from"].items()
        ):
            return Path(made["object"])
    fresh, depends = _temporary(record.with_suffix(".o")), _temporary(record.with_suffix(".d"))
    _compile([*flags, "-MMD", "-MF", str(depends), "-MT", "object", "-c", str(source)], fresh)
    names = depends.read_text().replace("\\\n", " ").partition(":")[2]
    depends.unlink()
    paths = [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", names)]
    contents = {path: _content(path) for path in paths}
    target = record.with_name(f"{record.stem}-{_digest(*contents.values())}.o")
    fresh.replace(target)
    partial = _temporary(record)
    partial.write_text(json.dumps({"object": str(target), "from": contents}))
    partial.replace(record)
    return target


def _linked(name: str, parts: Sequence[Path], flags: list[str]) -> Path:
    """A kernel names the very model it was linked to, so that of another is never taken."""
    stem, dot, suffix = name.partition(".")
    target = _place() / f"{stem}-{_digest(*map(str, parts), *_compiler(), *flags)}{dot}{suffix}"
    if not target.is_file():
        _compile([NEEDED, *flags, *map(str, parts)], target)
    return target
