"""Build of the native kernels through ninja: one extension module per instruction set of the CPU,
and one for CUDA where nvcc and a GPU are (BIGOPS_BUILD_CUDA=1: where nvcc is, 0: nowhere).

Kernels know neither Python nor torch, so only the bindings see a header that changes with the
environment, and editing one kernel rebuilds one object per instruction set. Metadata is in
pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"
BIND = ROOT / "csrc" / "bind"

FLAGS = runpy.run_path(str(ROOT / "bigops" / "backends" / "flags.py"))
ISA_FLAGS, COMMON, WARN = FLAGS["ISA_FLAGS"], FLAGS["COMMON"], FLAGS["WARN"]
BINDING, KERNEL = FLAGS["BINDING"], FLAGS["KERNEL"]
NVCC, gencode = FLAGS["NVCC"], FLAGS["gencode"]
ISAS = list(ISA_FLAGS) if FLAGS["IS_X86"] else ["base"]

# What is called once a tensor gets more than the other bindings.
HOT_BINDINGS = ("adam", "collected", "module", "sgd", "tensor_memory")
BINDINGS = [
    source
    for source in sorted(BIND.glob("*.cpp"))
    if source.stem not in ("cpu_features", "init") and not source.stem.startswith("cuda_")
]


def object_isa(isa: str, source: Path) -> str:
    """The instruction set a source is compiled for within a module: only *_bf16.cpp knows more
    than v4, so the bf16 modules share the objects of v4 for everything else."""
    if isa.startswith("v4_") and not source.stem.endswith("_bf16"):
        return "v4"
    return isa


def builds_cuda() -> bool:
    """Whether the CUDA kernels are to be built."""
    wanted = os.environ.get("BIGOPS_BUILD_CUDA", "")
    if wanted == "0" or not (wanted or Path("/dev/nvidia0").exists()):
        return False
    found = shutil.which("nvcc") is not None
    if wanted and not found:
        raise SystemExit("bigops: BIGOPS_BUILD_CUDA is set, but nvcc is not on the PATH")
    return found


class NinjaBuild(build_ext):
    """Writes build.ninja for all modules at once and runs it."""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler.split()[0]) is None:
            self.announce(
                f"bigops: no C++ compiler ('{compiler}' not found): installing without native "
                "kernels; `bigops doctor` tells more",
                level=4,
            )
            return
        if shutil.which("ninja") is None:
            raise SystemExit("bigops: the build needs ninja: pip install ninja")
        build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}"
        build_dir.mkdir(parents=True, exist_ok=True)
        outputs = {
            ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions
        }
        extra = os.environ.get("BIGOPS_CXXFLAGS", "")
        (build_dir / "build.ninja").write_text(ninja_file(compiler, ISAS, extra, cuda=BUILDS_CUDA))
        jobs = os.environ.get("MAX_JOBS")
        command = ["ninja", "-C", str(build_dir), *(["-j", jobs] if jobs else [])]
        if subprocess.call(command) != 0:
            raise SystemExit("bigops: compiling the native kernels failed (see the message above)")
        for name, path in outputs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            built = build_dir / module_file(name)
            # A new file, not new content: a running process may have the old one mapped.
            partial = path.with_suffix(".partial")
            shutil.copy2(built, partial)
            os.replace(partial, path)

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()]

    def get_outputs(self) -> list[str]:
        paths = [self.get_ext_fullpath(ext.name) for ext in self.extensions]
        return [p for p in paths if os.path.exists(p)]


def module_file(name: str) -> str:
    return name.rpartition(".")[2] + sysconfig.get_config_var("EXT_SUFFIX")


def ninja_file(
    compiler: str,
    isas: list[str],
    extra: str,
    binding_extra: str = "",
    cuda: bool = False,
    bindings: list[Path] = BINDINGS,
) -> str:
    """build.ninja of these instruction sets' modules, and of CUDA's. The `extra` flags, and the
    bindings' further ones, come last, so that they win."""
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    python_flags = " ".join(f"-isystem {shlex.quote(p)}" for p in includes)
    lines = [
        f"cxx = {compiler}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx -shared -fopenmp {extra} $in -o $out",
        "  description = link $out",
    ]

    def compile_(source: Path, obj: str, flags: str) -> str:
        last = "" if source.parent == CPU else binding_extra
        lines.append(f"build {obj}: compile {source}")
        lines.append(f"  flags = {flags} {WARN} {extra} {last}")
        return obj

    def link(name: str, objects: list[str]) -> None:
        lines.append(f"build {module_file(name)}: link {' '.join(objects)}")

    bind = f"{BINDING} {python_flags}"
    features = compile_(BIND / "cpu_features.cpp", "cpu_features.o", bind)
    link("_cpu_features", [features])
    bound = [
        compile_(
            source, f"bind_{source.stem}.o", f"{bind} -O2" if source.stem in HOT_BINDINGS else bind
        )
        for source in bindings
    ]
    kernels = sorted(CPU.glob("*.cpp"))
    done: set[str] = set()
    for isa in isas:
        objects = list(bound)
        for source in kernels:
            target = object_isa(isa, source)
            obj = f"{source.stem}.{target}.o"
            if obj not in done:
                done.add(compile_(source, obj, f"{KERNEL} {ISA_FLAGS.get(target, '')}"))
            objects.append(obj)
        flags = f"{bind} -DBIGOPS_MODULE_NAME=_native_{isa}"
        link(f"_native_{isa}", [*objects, compile_(BIND / "init.cpp", f"init.{isa}.o", flags)])
    if cuda:
        lines += [
            "rule nvcc",
            f"  command = nvcc -ccbin $cxx {NVCC} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link_cuda",
            f"  command = nvcc -ccbin $cxx {NVCC} -shared $in -o $out",
            "  description = link $out",
        ]
        sources = [*sorted(BIND.glob("cuda_*.cpp")), *sorted(CUDA.glob("*.cu"))]
        for source in sources:
            lines.append(f"build {source.stem}.cuda.o: nvcc {source}")
            flags = " ".join(gencode(source.stem)) if source.suffix == ".cu" else python_flags
            lines.append(f"  flags = {flags}")
        objects = " ".join(f"{source.stem}.cuda.o" for source in sources)
        lines.append(f"build {module_file('_native_cuda')}: link_cuda {objects}")
    return "\n".join(lines) + "\n"


BUILDS_CUDA = builds_cuda()
MODULES = ["_cpu_features", *(f"_native_{isa}" for isa in ISAS), *["_native_cuda"] * BUILDS_CUDA]

if __name__ == "__main__":  # tests/test_sanitizers.py builds with other flags
    setup(
        ext_modules=[Extension(f"bigops.{name}", sources=[]) for name in MODULES],
        cmdclass={"build_ext": NinjaBuild},
    )
