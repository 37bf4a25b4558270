"""`bigops doctor`: what this machine has, which backends work, and what would mend the rest."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import cuda, native, triton
from . import words

ABOUT = "Say what this machine has, try every backend on a small call, and how to mend the rest."

# Runs in its own process: Triton decides at import whether it interprets, and what crashes in a
# backend must not take the doctor along.
SMOKE = """
import sys, torch, bigops
from bigops.check import check_sample
from bigops.ops import get
backend, device, name, dtype = sys.argv[1:]
op = get("attention")
sample = next(s for s in op.samples if s.name == name)
torch.manual_seed(0)
bad = [c for c in check_sample(op, sample, backend, getattr(torch, dtype), device) if not c.ok]
sys.exit(f"wrong result: {bad[0]}" if bad else 0)
"""
SMOKE_SECONDS = 120
SMALL = ("odd sizes", "float32")
SMALL_CUDA = ("4096 elements", "bfloat16")  # tensor cores have neither odd sizes nor float32

ISAS = ("v3", "v4", "v4_bf16", "v4_amx", "base")
EXTRAS = {"rich": "rich", "matplotlib": "matplotlib", "scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Backend:
    """A backend on a device: None as `problem` when its smoke check passed."""

    name: str
    device: str
    problem: str | None
    mend: str | None = None
    note: str = ""


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser("doctor", help=ABOUT, description=ABOUT)
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Always 0: a machine that lacks something is no error."""
    words.writable("--json", args.json)
    machine = _machine()
    with words.progress() as progress:
        backends = _backends(progress)
    missing = _missing(machine)
    content = {
        "machine": machine,
        "backends": [vars(backend) for backend in backends],
        "missing": [{"what": what, "mend": mend} for what, mend in missing],
    }
    words.write_json(args.json, content)
    words.print_table("This machine", ("", "found"), [[k, _word(v)] for k, v in machine.items()])
    words.print_table(
        "Backends, each tried on a small attention, forward and backward",
        ("backend", "device", "state"),
        [[b.name, b.device, (b.problem or "works") + b.note] for b in backends],
    )
    mends = missing + [(f"{b.name} on {b.device}", b.mend) for b in backends if b.mend]
    for what, mend in mends:
        print(f"missing: {what}: {mend}")
    if not mends:
        print("nothing is missing")
    return 0


def _machine() -> dict[str, Any]:
    from ..bench import machine

    found = machine.describe()
    gpu = found.pop("gpu")
    del found["device"]
    found["memory_bytes"] = f"{found['memory_bytes'] / 2**30:.1f} GiB"
    found["memory"] = found.pop("memory_bytes")
    names = {"isa": "instruction set chosen", "isas": "instruction sets supported"}
    found = {names.get(key, key): value for key, value in found.items()}
    found["instruction sets built"] = [
        isa for isa in ISAS if importlib.util.find_spec(f"bigops._native_{isa}")
    ]
    found["numpy"] = machine.version("numpy")
    for package in EXTRAS:
        found[package] = machine.version(package)
    found["C++ compiler"] = _first_line(os.environ.get("CXX", "g++"))
    found["nvcc"] = _last_line("nvcc")
    found["GPU"] = gpu["name"] if gpu else None
    found["CUDA of torch"] = torch.version.cuda
    return found


def _backends(progress: words.Progress) -> list[Backend]:
    """Every backend on every device that is here."""
    gpu = torch.cuda.is_available()
    tried = [("native", "cpu"), ("triton", "cpu"), ("reference", "cpu")]
    tried += [("native", "cuda"), ("triton", "cuda"), ("reference", "cuda")] if gpu else []
    found = []
    for done, (name, device) in enumerate(tried):
        progress(f"{name} on {device}", done, len(tried))
        found.append(_try(name, device))
    if not gpu:
        reason = f"no GPU: {_why_no_gpu()}"
        found += [Backend(name, "cuda", reason) for name in ("native", "triton")]
    return found


def _try(name: str, device: str) -> Backend:
    if name == "native" and device == "cuda":
        return _try_cuda()
    if name == "native" and (reason := native.why_not()):
        mend = None
        if not native.SUPPORTED and "not built" in reason:
            mend = "apt-get install g++, then install bigops again"
        return Backend(name, device, reason, mend)
    if name == "triton" and not triton.INSTALLED:
        return Backend(name, device, "triton is not installed", 'pip install "triton>=3.6"')
    interpreted = name == "triton" and device == "cpu"
    note = " (interpreted, to test kernels; never chosen by itself)" if interpreted else ""
    problem = _smoke(name, device, SMALL, interpreted)
    return Backend(name, device, problem, _details(name) if problem else None, note)


def _try_cuda() -> Backend:
    """The CUDA C++ kernels, and of which ops they are chosen by themselves."""
    if reason := cuda.why_not():
        return Backend("native", "cuda", reason)
    here = cuda.capability(torch.device("cuda"))
    proven = sorted(op for op, capability in cuda.PROVEN if capability == here)
    note = " (unproven: opt-in)"
    if proven:
        note = f" (proven: {', '.join(proven)}; others opt-in)"
    problem = _smoke("native", "cuda", SMALL_CUDA)
    return Backend("native", "cuda", problem, _details("native") if problem else None, note)


def _smoke(name: str, device: str, call: tuple[str, str], interpreted: bool = False) -> str | None:
    """None if a small call comes out right, in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
    for name_of_choice in ("BIGOPS_BACKEND", "BIGOPS_STRICT"):
        environment.pop(name_of_choice, None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", SMOKE, name, device, *call],
            env=environment,
            capture_output=True,
            text=True,
            timeout=SMOKE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"hangs: no result within {SMOKE_SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _details(name: str) -> str:
    return f"bigops check --backend {name} says more"


def _missing(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, the command that mends it)."""
    found = []
    lacking = [package for package in EXTRAS if machine[package] is None]
    if lacking:
        found.append((", ".join(lacking), words.HINT))
    if machine["C++ compiler"] is None and native.SUPPORTED == []:
        found.append(("a C++ compiler", "apt-get install g++ (or set CXX)"))
    if machine["GPU"] is not None and importlib.util.find_spec("bigops._native_cuda") is None:
        toolkit = "" if machine["nvcc"] else "install the CUDA toolkit, then "
        found.append(("CUDA C++ kernels", f"{toolkit}install bigops again"))
    return found


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    return "torch finds no CUDA device"


def _first_line(command: str) -> str | None:
    return _output(command, 0)


def _last_line(command: str) -> str | None:
    return _output(command, -1)


def _output(command: str, line: int) -> str | None:
    program = command.split()[0]
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[line]


def _word(value: Any) -> str:
    if value is None or value == []:
        return "–"
    return ", ".join(value) if isinstance(value, list) else str(value)
