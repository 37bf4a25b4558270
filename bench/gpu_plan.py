"""The steps of a GPU run, in their order, with their commands, times and readers.

Their least times are what they took on an H200 with 16 cores (2026-11-26). All of them take eight
minutes; with less time the first in `by_value` are made, and the others skipped.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import gpu_results
from .gpu_machine import tool
from .gpu_steps import Reading, Step, divide

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / "build" / "importable"  # bigops as it is when installed, see link_package
PYTHON = sys.executable
CLI = (PYTHON, "-c", "import sys; from bigops.cli import main; sys.exit(main())")
# Truth is of the kernels' own arithmetic. With TF32, which cuDNN uses by default where it finds
# that faster, ours and eager's errors would depend on which of the two did.
IEEE_CLI = (
    PYTHON,
    "-c",
    "import sys, torch; torch.backends.cudnn.allow_tf32 = False; "
    "from bigops.cli import main; sys.exit(main())",
)
# What can be imported now, and what there is to measure: op -> number of realistic samples.
PROBE = (
    "import importlib.util, json, bigops, bigops.bench, bigops.kernels; "
    "from bigops.backends import native; from bigops.ops import table; "
    "print(json.dumps({'version': bigops.__version__, 'path': bigops.__file__,"
    " 'native': native.ISA or native.REASON,"
    " 'inspect': importlib.util.find_spec('bigops.cli.inspect') is not None,"
    " 'samples': {op.name: sum(s.bench for s in op.samples) for op in table().values()}}))"
)
# An older setuptools than pyproject.toml asks for refuses that file, which it looks for where it
# runs: in the folder of links there is none, and it builds into that one.
BUILD_INTO = (
    "import os, runpy, sys; script, folder = sys.argv[1:]; os.chdir(folder); "
    "sys.argv[1:] = ['build_ext', '--inplace']; runpy.run_path(script, run_name='__main__')"
)
REPORT = (
    "import json, pathlib, sys; from bigops.bench import report; source, target = sys.argv[1:]; "
    "pathlib.Path(target).write_text(report.page(json.loads(pathlib.Path(source).read_text())))"
)
MODELS = ("CNN", "Transformer")
# The flagships first, then the models, then whatever else the table has.
PRIORITIES = {
    "attention": 4.0, "conv2d_act": 3.0, "conv2d_relu_max_pool2d": 3.0, "adam": 3.0,
    "CNN": 2.0, "Transformer": 2.0,
}  # fmt: skip
# Seconds of a benchmark: the process' start and its ceilings, a case's truth and first calls, a
# case's torch.compile and what `bigops bench --quick` gives all of them, a case's peak memory.
START, CASE, COMPILE, ALL_COMPILES, MEMORY = 10.0, 1.5, 12.0, 40.0, 20.0
REPORT_SECONDS = 15.0
PROCESS_BYTES = 3 << 30  # of the GPU's memory: a context and the largest samples


def machine_step(out: Path, device: str) -> Step:
    path = out / "machine.json"

    def read(log: str) -> Reading:
        found = gpu_results.load(path, {"torch": dict, "packages": dict})
        devices, packages = found["torch"]["devices"], found["packages"]
        versions = f"torch {packages['torch']}, triton {packages['triton']}, nvcc {found['nvcc']}"
        if devices:
            return Reading(f"{devices[0]['name']}, {versions}")
        missing = f"no GPU: {found['torch'].get('reason')}"
        return Reading(versions, missing if device == "cuda" else None)

    command = [PYTHON, str(ROOT / "bench" / "gpu_machine.py"), str(path)]
    return Step("machine", lambda seconds: [command], 10, 60, read)


def build_steps(no_build: bool, ops: Sequence[str]) -> list[Step]:
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    commands = [
        [PYTHON, "-m", "pip", "install", *offline, "-e", str(ROOT)],
        [PYTHON, "setup.py", "build_ext", "--inplace"],
        [PYTHON, "-c", BUILD_INTO, str(ROOT / "setup.py"), str(LINKS)],
    ]

    def read(log: str) -> Reading:
        found = json.loads(log.strip().splitlines()[-1])
        known = [*found["samples"], *MODELS]
        unknown = [name for name in ops if name not in known]
        wrong = f"unknown: {', '.join(unknown)}; known: {', '.join(known)}" if unknown else None
        where = f"bigops {found['version']} in {Path(found['path']).parent}"
        return Reading(f"{where}, native: {found['native']}", wrong)

    why_not = "--no-build" if no_build else None
    return [
        Step("build", lambda seconds: commands, 30, 180, why_not=why_not),
        Step("import", lambda seconds: [[PYTHON, "-c", PROBE]], 10, 60, read),
    ]


def proof_steps(out: Path, device: str, ops: Sequence[str], found: Mapping[str, Any]) -> list[Step]:
    """What shows whether the kernels are right; `found` is what machine and import have told."""
    machine, there = found.get("machine", {}), found.get("import", {})
    no_gpu = None if device == "cuda" else "needs a GPU"
    names = [name for name in ops if name not in MODELS]
    no_op = "models have none of their own" if ops and not names else None
    no_pytest = None if machine.get("packages", {}).get("pytest", True) else "no pytest here"
    sanitizer = machine.get("compute-sanitizer") or tool("compute-sanitizer")
    no_sanitizer = None if sanitizer else "no compute-sanitizer here"
    no_inspect = None if there.get("inspect", True) else "bigops has no such command yet"
    exercise = [PYTHON, "-m", "bigops.bench.exercise", *names, "--device", device]

    def pytest(seconds: float) -> list[list[str]]:
        only = ["-k", " or ".join(ops)] if ops else []
        xml = f"--junitxml={out / 'pytest.xml'}"
        # Others may import what is not here, and no test runs after such an error.
        of_gpu = re.compile(r"mark\.gpu|\bgpu_places\b").search
        files = [f for f in sorted(ROOT.glob("tests/test_*.py")) if of_gpu(f.read_text())]
        words = ["-m", "gpu", *only, "-v", "-rfE", "--durations=10", "-p", "no:cacheprovider", xml]
        return [[PYTHON, "-m", "pytest", *words, *(str(f.relative_to(ROOT)) for f in files)]]

    def check(name: str, *words: str) -> Step:
        path = out / f"{name}.json"
        command = [*IEEE_CLI, "check", *names, "--device", device, *words, "--json", str(path)]
        read = partial(gpu_results.read_check, path)
        # The same samples and rule as pytest's: last, for its JSON and the command itself.
        return Step(name, lambda seconds: [command], 30, 120, read, no_op, weight=0.5)

    def sanitize(which: str) -> Step:
        def commands(seconds: float) -> list[list[str]]:
            # Under the sanitizer torch alone takes long to start.
            calls = [*exercise, "--seconds", f"{max(5.0, seconds - 15.0):.0f}"]
            return [[str(sanitizer), "--tool", which, "--error-exitcode", "86", *calls]]

        # Each allocation on its own, or what lies behind a tensor would be torch's cache.
        return Step(
            which, commands, 12, 60, gpu_results.read_sanitizer, no_gpu or no_op or no_sanitizer,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip

    compile_ = [*exercise, "--bench", "--jobs", str(_jobs(machine))]
    inspect = [*CLI, "inspect", "--json", str(out / "inspect.json")]
    read_pytest = partial(gpu_results.read_pytest, out / "pytest.xml")
    return [
        Step("compile", lambda s: [compile_], 65, 150, gpu_results.read_calls, no_gpu or no_op),
        Step("pytest", pytest, 60, 240, read_pytest, no_gpu or no_pytest, weight=2.0, partial=True),
        sanitize("memcheck"),
        sanitize("racecheck"),
        Step("inspect", lambda s: [inspect], 5, 30, why_not=no_gpu or no_inspect),
        check("check"),
        check("check-bench", "--bench"),
    ]


def rates_steps(out: Path, device: str, ops: Sequence[str], found: Mapping[str, Any]) -> list[Step]:
    """The CUDA C++ kernels alone in the field's units, beside cuDNN's, torch's fused and a copy."""
    no_gpu = None if device == "cuda" else "needs a GPU"
    no_nvcc = None if found.get("machine", {}).get("nvcc", True) else "no nvcc here"

    def rates(op: str, least: float, most: float) -> Step:
        command = [PYTHON, "-m", f"bigops.bench.{op}_rates", str(out / f"{op}-rates.json")]
        not_asked = None if not ops or op in ops else "another op is asked for"
        read = partial(gpu_results.read_rates, f"{op}_rates")
        why_not = no_gpu or no_nvcc or not_asked
        return Step(f"{op} rates", lambda s: [command], least, most, read, why_not, 0.75)

    return [rates("attention", 40, 90), rates("adam", 20, 60)]


def _jobs(machine: Mapping[str, Any]) -> int:
    """Processes that compile at once: one a core, if the GPU holds so many and lets them in."""
    devices = machine.get("torch", {}).get("devices", [])
    fit = [device["memory_bytes"] // PROCESS_BYTES for device in devices]
    listed = machine.get("nvidia-smi")
    if isinstance(listed, list) and any("Exclusive" in (g["compute_mode"] or "") for g in listed):
        fit.append(1)
    return max(1, min([16, int(machine.get("cores", os.cpu_count() or 1)), *fit]))


def bench_steps(
    out: Path, device: str, ops: Sequence[str], samples: Mapping[str, int]
) -> list[Step]:
    """One process for each op and model, the most wanted first."""
    cases = {name: 2 * count for name, count in samples.items()} | dict.fromkeys(MODELS, 1)
    names = [name for name in cases if cases[name] and (not ops or name in ops)]
    names.sort(key=lambda name: -PRIORITIES.get(name, 1.0))
    return [_bench_step(out, device, name, cases[name]) for name in names]


def _bench_step(out: Path, device: str, name: str, cases: int) -> Step:
    path = out / "bench" / f"{name}.json"
    least = START + CASE * cases
    compiles = min(ALL_COMPILES, COMPILE * cases)

    def commands(share: float) -> list[list[str]]:
        words = ["bench", name, "--device", device, "--json", str(path), "--report", ""]
        spare = share - least
        if spare > (MEMORY + COMPILE) * cases:  # else its processes would take all of the time
            spare -= (MEMORY + COMPILE) * cases
        elif spare > compiles + cases:
            words.append("--quick")
            spare -= compiles
        else:
            words += ["--quick", "--no-compile"]
        # A short kernel is measured twice, launched and as a graph's replay.
        seconds = min(3.0, max(0.1, spare / (2.5 * cases)))
        return [[*CLI, *words, "--seconds", f"{seconds:.2f}"]]

    weight = PRIORITIES.get(name, 1.0)
    most = least + compiles + 7.5 * cases + MEMORY * cases
    read = partial(gpu_results.read_bench, path)
    return Step(f"bench {name}", commands, least, most, read, weight=weight)


def scaled(steps: Sequence[Step], minutes: float) -> list[Step]:
    """The same, allowed more where there is more time than the ten minutes that they want."""
    return [replace(step, most=step.most * max(1.0, minutes / 10.0)) for step in steps]


def by_value(steps: Sequence[Step], seconds: float) -> list[Step]:
    """The same, of which those that are worth least are to be skipped where not all fit."""
    able = [step for step in steps if step.why_not is None]
    admitted = divide(seconds, sorted(able, key=lambda step: -step.weight))
    no_time = f"the {seconds:.0f} s for it and others are too few"
    return [
        step if step.why_not or step.name in admitted else replace(step, why_not=no_time)
        for step in steps
    ]
